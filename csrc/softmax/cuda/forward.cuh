// `forward`: y, final states and borders; `summarize`: the state that each segment makes from nothing, and its decays;
// `carry`: the state that enters each segment.
#pragma once
#include "threads.cuh"

namespace mru::softmax::cuda {

constexpr int kThreads = 128;               // of a block of `forward` and `summarize`
template <class F>
constexpr int kBlocks = sizeof(typename F::S) == 8 ? 3 : 4;  // of a multiprocessor, at least
constexpr int kCarryChannels = 4;           // of a block of `carry`, which has a warp for each
constexpr unsigned kAllLanes = 0xffffffff;

// The streams of a segment, a tile at a time. The next tile is on its way while the thread works on one.
template <class F>
class Ahead {
 public:
  __device__ __forceinline__ Ahead(const HeadScan& scan, const Place<F>& place, const Range& range)
      : lines_(scan, place, range.row, range.begin), left_(range.end - range.begin) {
    fetch();
  }
  // Calls each(inputs) for the next steps: a tile, or what is left of the segment.
  template <class Each>
  __device__ __forceinline__ void tile(Each each) {
    Inputs<F> now[F::kTile];
#pragma unroll
    for (int t = 0; t < F::kTile; ++t) now[t] = next_[t];
    const int64_t count = left_;
    left_ -= F::kTile;
    fetch();
#pragma unroll
    for (int t = 0; t < F::kTile; ++t)
      if (t < count) each(now[t]);
  }

 private:
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int t = 0; t < F::kTile; ++t)
      if (t < left_) lines_.next(next_[t]);
  }
  Lines<F> lines_;
  int64_t left_;
  Inputs<F> next_[F::kTile];
};

// From a state at the begin of a segment to the one at its end: each(inner, inputs) takes a step, and at_border(state,
// position) sees every state with which a chunk begins.
template <class F, class Each, class AtBorder>
__device__ __forceinline__ void over_chunks(const Call<F>& call, const Place<F>& place, const Range& range,
                                            State<F>& state, Each each, AtBorder at_border) {
  Ahead<F> ahead(call.scan, place, range);
  for (int64_t position = range.begin; position < range.end;) {
    const int64_t left = range.end - position, end = left < call.scan.chunk ? range.end : position + call.scan.chunk;
    at_border(state, position);
    Inner<F> inner(state);
    for (; position < end; position += F::kTile) ahead.tile([&](const Inputs<F>& inputs) { each(inner, inputs); });
    state = inner.closed();
  }
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocks<F>) forward(const __grid_constant__ Call<F> call) {
  using T = typename F::T;
  const HeadScan& scan = call.scan;
  const Place<F> place(call);
  if (!place.inside) return;
  const Range range(call, place.segment);
  const bool enters = range.begin == range.start;
  State<F> state(call, place, enters ? scan.initial : call.template work<char>(call.plan.second),
                 enters ? range.sequence : place.segment);
  const HeadInputs<F> heads(scan, place);
  Line<T> y(scan, scan.h, range.row, range.begin, place.channel);
  over_chunks<F>(
      call, place, range, state,
      [&](Inner<F>& inner, const Inputs<F>& inputs) {
        Vector<typename F::S, F::W> out;
        take_step(inner, inputs, heads, &out);
        store<Traffic::kStream>(y.at, narrow<T>(out));
        y.advance();
      },
      [&](const State<F>& border, int64_t position) {
        if (scan.checkpoints && position != range.start)
          border.save(call, place, scan.checkpoints, border_row(call, range, position));
      });
  if (range.last) state.save(call, place, scan.final_state, range.sequence);
}

// Plan::first and Plan::decays of every segment.
template <class F>
__global__ void __launch_bounds__(kThreads, kBlocks<F>) summarize(const __grid_constant__ Call<F> call) {
  using S = typename F::S;
  const Place<F> place(call);
  if (!place.inside) return;
  const Range range(call, place.segment);
  State<F> state;
  const HeadInputs<F> heads(call.scan, place);
  S decays[F::kScores] = {};
  over_chunks<F>(
      call, place, range, state,
      [&](Inner<F>& inner, const Inputs<F>& inputs) {
        take_step(inner, inputs, heads);
#pragma unroll
        for (int h = 0; h < F::kScores; ++h) decays[h] += heads.decay_of(inputs, h);
      },
      [](const State<F>&, int64_t) {});
  state.save(call, place, call.template work<char>(call.plan.first), place.segment);
  if (place.leads())
#pragma unroll
    for (int h = 0; h < F::kScores; ++h)
      store<Traffic::kState>(call.work(call.plan.decays) + place.segment * call.scan.heads + place.head + h,
                             Vector<S, 1>{{decays[h]}});
}

// Steps of one channel as one.
template <class S>
struct ChannelPiece {
  Piece<S> head;
  S mean;

  // This piece, then another.
  __device__ __forceinline__ ChannelPiece then(const ChannelPiece& second) const {
    ChannelPiece both = *this;
    const S k = softmax::then(both.head, second.head);
    both.mean = mix(k, mean, second.mean);
    return both;
  }
  // That of another lane.
  template <class Shuffle>
  __device__ __forceinline__ ChannelPiece from(Shuffle shuffle) const {
    return {{shuffle(head.decay), shuffle(head.Z), shuffle(head.z)}, shuffle(mean)};
  }
};

// The states that enter the segments of a row (Plan::second), but for the first. A warp has a channel of a row and goes
// through its segments in turns; each lane has one.
template <class F>
__global__ void __launch_bounds__(kCarryChannels* int(kWarp)) carry(const __grid_constant__ Call<F> call) {
  using S = typename F::S;
  const HeadScan& scan = call.scan;
  const Plan& plan = call.plan;
  const int lane = int(threadIdx.x);
  const int64_t blocks = (scan.channels + kCarryChannels - 1) / kCarryChannels;
  const int64_t row = blockIdx.x / unsigned(blocks);
  const int64_t channel = (blockIdx.x - row * blocks) * kCarryChannels + threadIdx.y;
  if (channel >= scan.channels) return;
  const int64_t head = int64_t(unsigned(channel) / unsigned(plan.group));
  const S* const pieces = call.work(plan.first);
  S* const entries = call.work(plan.second);
  const auto at = [](const S* p) { return load<Traffic::kState, 1>(p).at[0]; };
  const auto put = [](S* p, S x) { store<Traffic::kState>(p, Vector<S, 1>{{x}}); };
  const auto piece_of = [&](const S* state, S decay) {
    const S* const of_head = state + scan.channels + head;
    return ChannelPiece<S>{{decay, at(of_head), at(of_head + scan.heads)}, at(state + channel)};
  };
  const ChannelPiece<S> none{no_steps<S>(), S(0)};
  ChannelPiece<S> entry = none;  // what enters the turn
  if (scan.initial) entry = piece_of(static_cast<const S*>(scan.initial) + row * plan.columns, S(0));
  for (int64_t turn = 0; turn < plan.row_segments; turn += kWarp) {
    const int64_t segment = row * plan.row_segments + turn + lane;
    const bool inside = turn + lane < plan.row_segments;
    ChannelPiece<S> all = none;
    if (inside) all = piece_of(pieces + segment * plan.columns, at(call.work(plan.decays) + segment * scan.heads + head));
#pragma unroll
    for (int by = 1; by < int(kWarp); by *= 2) {
      const ChannelPiece<S> before = all.from([&](S x) { return __shfl_up_sync(kAllLanes, x, by); });
      if (lane >= by) all = before.then(all);
    }
    const ChannelPiece<S> before = all.from([](S x) { return __shfl_up_sync(kAllLanes, x, 1); });
    const ChannelPiece<S> state = lane == 0 ? entry : entry.then(before);
    if (inside && turn + lane > 0) {
      S* const to = entries + segment * plan.columns;
      put(to + channel, state.mean);
      if (channel == head * plan.group) {
        put(to + scan.channels + head, state.head.Z);
        put(to + scan.channels + scan.heads + head, state.head.z);
      }
    }
    entry = entry.then(all.from([](S x) { return __shfl_sync(kAllLanes, x, int(kWarp) - 1); }));
  }
}

}  // namespace mru::softmax::cuda
