// `forward`: y, final states and borders. `summarize`: the state that each segment makes from nothing, and its decays.
#pragma once
#include "threads.cuh"

namespace mru::softmax::cuda {

constexpr int kThreads = 128;  // of a block of `forward` and `summarize`
template <class F>
constexpr int kBlocks = sizeof(typename F::S) == 8 ? 3 : 4;  // of a multiprocessor, at least

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
  State<F> state(call, place, range.first ? scan.initial : call.template work<char>(call.plan.second),
                 range.first ? range.sequence : place.segment);
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
          border.save(call, place, scan.checkpoints, border_row(call, range.row, position));
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

}  // namespace mru::softmax::cuda
