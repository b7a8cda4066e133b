// What every kernel over channels shares: what it is compiled for and given, where a thread is, the states, the streams.
#pragma once
#include "../../cuda/spans.cuh"
#include "../step.h"
#include "plan.h"

namespace mru::softmax::cuda {

using namespace mru::cuda;  // memory.cuh, spans.cuh
using mru::cuda::Vector;    // not the one of CPU vectors

// W channels a thread, side by side. kHeads: they belong to one head, which several threads may share; else each is a head.
template <class T_, int W_, bool kBonus_, bool kHeads_>
struct Form {
  using T = T_;
  using S = typename StateOf<T>::type;
  static constexpr bool kBonus = kBonus_, kHeads = kHeads_;
  static constexpr int W = W_, kScores = kHeads ? 1 : W;  // channels and heads of a thread
  // Steps whose streams, or in the backward pass whose factors, lie in registers.
  static constexpr int kTile = W == 1 && sizeof(S) == 4 ? 8 : 4;
  static constexpr __host__ __device__ int head(int w) { return kHeads ? 0 : w; }
};

template <class F>
struct Call {
  HeadScan scan;
  Plan plan;
  char* workspace;
  bool from_zero = false;  // backward: makes the summaries of segments

  // For kernels of another form.
  template <class G>
  Call<G> as() const {
    return {scan, plan, workspace, from_zero};
  }
  template <class S = typename F::S>
  MRU_INLINE S* work(int64_t place) const {
    return reinterpret_cast<S*>(workspace + place);
  }
};

// The segment and the channels of a thread. Threads of heads come in whole warps, because they meet in shuffles; those
// without channels of their own shadow others, and store nothing.
template <class F>
struct Place {
  int64_t segment, head, channel, part = 0;
  int lane = 0;         // in its part
  bool inside = false;  // whether the thread has channels of its own

  __device__ __forceinline__ explicit Place(const Call<F>& call) {
    const Plan& plan = call.plan;
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if constexpr (!F::kHeads) {
      segment = plan.across(thread);
      inside = segment < plan.segments;
      head = channel = (thread - segment * plan.across.divisor()) * F::W;
    } else {
      const int64_t warp = thread / kWarp, parts = call.scan.heads * plan.parts;
      const int in_warp = int(threadIdx.x) % int(kWarp), of_part = in_warp / plan.lanes;
      segment = plan.across(warp);
      lane = in_warp % plan.lanes;
      const int64_t of_segment = (warp - segment * plan.warps) * (kWarp / plan.lanes) + of_part;
      inside = segment < plan.segments && of_part < int(kWarp) / plan.lanes && of_segment < parts;
      const unsigned at = unsigned(inside ? of_segment : 0);
      head = at / unsigned(plan.parts), part = at % unsigned(plan.parts);
      int64_t of_head = part * plan.lanes + lane;
      if (of_head >= plan.threads) inside = false;
      if (!inside) of_head = 0;
      channel = head * plan.group + of_head * F::W;
    }
  }
  // Whether the thread stores what belongs to its heads, or to its part of one.
  __device__ __forceinline__ bool leads_part() const { return inside && lane == 0; }
  __device__ __forceinline__ bool leads() const { return leads_part() && part == 0; }
};

// The sum over the threads of a part, in the first of them; always in the same order. The whole warp calls it.
template <class F>
__device__ __forceinline__ typename F::S sum_of_part(const Plan& plan, const Place<F>& place, typename F::S x) {
  if constexpr (F::kHeads) {
    if (!place.inside) x = 0;
    for (int by = plan.first_shuffle; by > 0; by /= 2) {
      const typename F::S other = __shfl_down_sync(~0u, x, by);
      if (place.lane + by < plan.lanes) x += other;
    }
  }
  return x;
}

// The number of the first segment of a sequence. That of the next sequence is greater.
template <class F>
__device__ __forceinline__ int64_t first_segment(const Call<F>& call, int64_t sequence) {
  if (!call.scan.offsets) return sequence * call.plan.row_segments;
  return sequence + call.plan.steps_divisor(offset_of(call.scan, sequence));
}
// The sequence of a segment: the last one whose first segment has no greater number.
template <class F>
__device__ __forceinline__ int64_t sequence_of(const Call<F>& call, int64_t segment) {
  if (!call.scan.offsets) return call.plan.row_divisor(segment);
  if (!call.plan.is_cut()) return segment;
  int64_t low = 0, high = call.scan.sequences;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_segment(call, middle) <= segment) low = middle;
    else high = middle;
  }
  return low;
}

// A sequence: positions [start, end) of a row, and `count` segments from number `first` on.
struct Sequence {
  int64_t row, start, end, first, count;

  template <class F>
  __device__ __forceinline__ Sequence(const Call<F>& call, int64_t sequence)
      : row(sequence), start(0), end(call.scan.time), first(first_segment(call, sequence)) {
    if (call.scan.offsets) row = 0, bounds(call.scan, sequence, start, end);
    count = call.plan.steps_divisor(end - start + call.plan.steps - 1);
    if (count == 0) count = 1;  // an empty sequence has a final state
  }
};

// The steps of a segment: positions [begin, end) of a row.
struct Range {
  int64_t row, sequence, start, begin, end;  // start: position of the sequence's first step
  bool first, last;                          // whether the sequence begins at `begin`, ends at `end`

  template <class F>
  __device__ __forceinline__ Range(const Call<F>& call, int64_t segment) : sequence(sequence_of(call, segment)) {
    const Sequence all(call, sequence);
    const int64_t index = segment - all.first;
    row = all.row, start = begin = end = all.start, first = index == 0, last = index == all.count - 1;
    if (index < 0 || index >= all.count) return;  // a number that is left over
    begin += index * call.plan.steps;
    end = last ? all.end : begin + call.plan.steps;
  }
};

// ------------------------------------------------------------------------------------------------ states

// A state, with Z and z at the borders of chunks.
template <class F>
struct State {
  using S = typename F::S;
  S mean[F::W], Z[F::kScores], z[F::kScores];

  __device__ __forceinline__ State() {
#pragma unroll
    for (int w = 0; w < F::W; ++w) mean[w] = 0;
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) Z[h] = -kInfinity<S>, z[h] = 0;
  }
  // Row `row` of states [rows, D + 2 H], or if there are none the empty state.
  __device__ __forceinline__ State(const Call<F>& call, const Place<F>& place, const void* states, int64_t row)
      : State() {
    if (!states) return;
    const S* const at = static_cast<const S*>(states) + row * call.plan.columns;
    const S* const of_head = at + call.scan.channels + place.head;
#pragma unroll
    for (int w = 0; w < F::W; ++w) mean[w] = load<Traffic::kState, 1>(at + place.channel + w).at[0];
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) {
      Z[h] = load<Traffic::kState, 1>(of_head + h).at[0];
      z[h] = load<Traffic::kState, 1>(of_head + call.scan.heads + h).at[0];
    }
  }
  __device__ __forceinline__ void save(const Call<F>& call, const Place<F>& place, void* states, int64_t row) const {
    if (!place.inside) return;
    S* const at = static_cast<S*>(states) + row * call.plan.columns;
    S* const of_head = at + call.scan.channels + place.head;
#pragma unroll
    for (int w = 0; w < F::W; ++w) store<Traffic::kState>(at + place.channel + w, Vector<S, 1>{{mean[w]}});
    if (!place.leads()) return;
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) {
      store<Traffic::kState>(of_head + h, Vector<S, 1>{{Z[h]}});
      store<Traffic::kState>(of_head + call.scan.heads + h, Vector<S, 1>{{z[h]}});
    }
  }
};

// The row of the borders that has the state before a position, the first of a chunk that is not its sequence's first.
template <class F>
__device__ __forceinline__ int64_t border_row(const Call<F>& call, int64_t row, int64_t position) {
  return row * call.scan.checkpoint_rows + call.plan.chunk_divisor(position) - 1;
}

// Inside a chunk.
template <class F>
struct Inner {
  using S = typename F::S;
  S mean[F::W];
  Weight<S> weight[F::kScores];

  Inner() = default;
  __device__ __forceinline__ explicit Inner(const State<F>& state) {
#pragma unroll
    for (int w = 0; w < F::W; ++w) mean[w] = state.mean[w];
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) weight[h] = open(state.Z[h], state.z[h]);
  }
  __device__ __forceinline__ State<F> closed() const {
    State<F> state;
#pragma unroll
    for (int w = 0; w < F::W; ++w) state.mean[w] = mean[w];
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) {
      const Pair<S> log = close(weight[h]);
      state.Z[h] = log.hi, state.z[h] = log.lo;
    }
    return state;
  }
};

// ------------------------------------------------------------------------------------------------ streams

// The elements of a thread in a stream, from one scan position to the next.
template <class T>
struct Line {
  T* at;
  int64_t step;

  Line() = default;
  __device__ __forceinline__ Line(const Scan& scan, const Stream& stream, int64_t row, int64_t position, int64_t column,
                                  int direction = 1)
      : at(static_cast<T*>(stream.data)), step(scan.reverse ? -stream.time : stream.time) {
    at += row * stream.batch + (scan.reverse ? scan.time - 1 - position : position) * stream.time + column;
    step *= direction;
  }
  __device__ __forceinline__ void advance() { at = mru::cuda::advance(at, step); }
};

// The inputs of a step of a thread.
template <class F>
struct Inputs {
  Vector<typename F::T, F::kScores> score, decay;
  Vector<typename F::T, F::W> value;
};

// The inputs [H], and whether the decay is one of them.
template <class F>
struct HeadInputs {
  using S = typename F::S;
  S decay[F::kScores], bonus[F::kScores];
  bool decay_is_stream;

  __device__ __forceinline__ HeadInputs(const HeadScan& scan, const Place<F>& place)
      : decay_is_stream(scan.in[kDecay].stream.data) {
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) {
      const auto at = [&](int i) {
        const S* const values = static_cast<const S*>(scan.in[i].channel);
        return values ? load<Traffic::kState, 1>(values + place.head + h).at[0] : S(0);
      };
      decay[h] = at(kDecay);
      bonus[h] = F::kBonus ? at(kBonus) : S(0);
    }
  }
  __device__ __forceinline__ S decay_of(const Inputs<F>& inputs, int h) const {
    return decay_is_stream ? widen(inputs.decay, h) : decay[h];
  }
};

// The three streams of a thread.
template <class F>
struct Lines {
  using T = const typename F::T;
  Line<T> score, value, decay;
  bool has_decay;

  __device__ __forceinline__ Lines(const HeadScan& scan, const Place<F>& place, int64_t row, int64_t position)
      : score(scan, scan.in[kScore].stream, row, position, place.head),
        value(scan, scan.in[kValue].stream, row, position, place.channel),
        has_decay(scan.in[kDecay].stream.data) {
    if (has_decay) decay = Line<T>(scan, scan.in[kDecay].stream, row, position, place.head);
  }
  __device__ __forceinline__ void next(Inputs<F>& inputs) {
    inputs.score = load<Traffic::kStream, F::kScores>(score.at);
    inputs.value = load<Traffic::kStream, F::W>(value.at);
    if (has_decay) inputs.decay = load<Traffic::kStream, F::kScores>(decay.at);
    advance();
  }
  __device__ __forceinline__ void advance() {
    score.advance(), value.advance();
    if (has_decay) decay.advance();
  }
};

// What a step did, for the backward pass: how it updated the mean, and how it read it if it has a bonus.
template <class F>
struct Shares {
  Share<typename F::S> update[F::kScores], read[F::kBonus ? F::kScores : 1];
};
// A step: y, if there is room for it.
template <class F>
__device__ __forceinline__ Shares<F> take_step(Inner<F>& inner, const Inputs<F>& inputs, const HeadInputs<F>& heads,
                                               Vector<typename F::S, F::W>* y = nullptr) {
  Shares<F> shares;
#pragma unroll
  for (int h = 0; h < F::kScores; ++h) {
    const auto score = widen(inputs.score, h);
    if constexpr (F::kBonus) shares.read[h] = read(score, heads.bonus[h], inner.weight[h]);
    shares.update[h] = update<true>(score, heads.decay_of(inputs, h), inner.weight[h]);
  }
#pragma unroll
  for (int w = 0; w < F::W; ++w) {
    const int h = F::head(w);
    const auto v = widen(inputs.value, w), before = inner.mean[w];
    inner.mean[w] = mix(shares.update[h].k, before, v);
    if (y) y->at[w] = F::kBonus ? mix(shares.read[F::kBonus ? h : 0].k, before, v) : inner.mean[w];
  }
  return shares;
}

}  // namespace mru::softmax::cuda
