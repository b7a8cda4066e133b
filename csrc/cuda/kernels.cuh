// The CUDA kernels: a scan over a cell (csrc/cells), threads along the channels, time inside a thread.
//
//   B batch, T time, D channels     W channels of a thread, side by side: 16 bytes of a stream, or 1
//   row        of a batch; a packed call has one          position  of the scan in a row: 0 is the first step scanned
//   sequence   n; begins and ends inside a row            job       the positions that a thread scans (plan.h)
//   span       a job's part of one sequence               tile      U steps, aligned: their loads are issued together
//                                                                   (single steps at the ends of a span)
//   s, m       state; a lambda of the step to the right   a, u      a job as one map: s -> a s + u; m -> a m + u
//
// Threads share nothing, except in `carry` and `reduce`; `backward` uses shared memory as room of each thread's own. A NaN state stays NaN; nothing is multiplied by a factor 0.
#pragma once
#include "memory.cuh"
#include "plan.h"

namespace mru::cuda {

constexpr int kForwardThreads = 64;
constexpr int kForwardTile = 8, kBackwardTile = 8;
constexpr int kLanes = 32, kGroups = 32;  // threads of `carry` and `reduce`: channels, rows at once

// The factor of a job in which a sequence begins (for the adjoint: ends): what came before is forgotten, NaN included.
// It is NaN; where a NaN in the inputs makes a factor NaN, the offset is NaN as well, and nothing is lost.
template <class S>
__device__ __forceinline__ S forgets() {
  return S(__builtin_nan(""));
}

// What a kernel is compiled for. Bit i of kChannels_: input i is one value per channel instead of a stream.
template <class Cell_, class T_, int W_, unsigned kChannels_>
struct Form {
  using Cell = Cell_;
  using T = T_;
  using S = typename StateOf<T_>::type;
  using States = Vector<S, W_>;
  static constexpr int W = W_, kInputs = Cell::kInputs;
  static constexpr __host__ __device__ bool per_channel(int i) { return kChannels_ >> i & 1; }
  static constexpr int kStreams = [] {
    int count = 0;
    for (int i = 0; i < kInputs; ++i) count += !per_channel(i);
    return count;
  }();
  // What `backward` sums over time: alpha's gradient, then that of each input that comes per channel.
  static constexpr int kSums = 1 + kInputs - kStreams;
};

// Device memory that the launches of one call share.
template <class S>
struct Workspace {
  S* factor;  // [jobs, D]
  S* offset;  // [jobs, D]
  S* entry;   // [jobs, D]: s or m where the job begins (for the adjoint: at its right)
  S* sums;    // [sum_rows, sums, D]
};

// What every kernel over channels is given.
template <class S>
struct Call {
  Scan scan;
  Plan plan;
  Workspace<S> work;
  Divisor across;  // D / W: the threads of a job
};

// ------------------------------------------------------------------------------------------------ where a thread is

struct Place {
  int64_t job, d;  // and the first of its W channels
};
template <class F>
__device__ __forceinline__ Place place(const Call<typename F::S>& call) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, job = call.across(thread);
  return {job, thread * F::W - job * call.scan.channels};
}

struct Span {
  int64_t row, sequence, begin, end;
  bool first, last;  // whether the sequence begins at `begin`, ends at `end`
};

// The spans of a job, one after another; with direction -1 from the right.
class Spans {
 public:
  __device__ __forceinline__ Spans(const Scan& scan, const Plan& plan, int64_t job, int direction)
      : scan_(scan), direction_(direction) {
    if (!plan.chunked()) {
      one_ = {job, job, 0, scan.time, true, true};
      if (scan.offsets) one_.row = 0, bounds(job, one_.begin, one_.end);
    } else {
      const int64_t row = plan.segments_divisor(job), begin = (job - row * plan.segments) * scan.segment;
      const int64_t end = begin + scan.segment < scan.time ? begin + scan.segment : scan.time;
      one_ = {row, row, begin, end, begin == 0, end == scan.time};
      packed_ = scan.offsets != nullptr;
      if (packed_) order_ = find();
    }
  }

  __device__ __forceinline__ bool next(Span& span) {
    if (!packed_) {
      span = one_;
      const bool more = !done_;
      done_ = true;
      return more;
    }
    for (; order_ >= 0 && order_ < scan_.sequences; order_ += direction_) {
      const int64_t n = sequence(order_);
      int64_t begin, end;
      bounds(n, begin, end);
      if (direction_ > 0 ? begin >= one_.end : end <= one_.begin) return false;
      span = {0, n, begin > one_.begin ? begin : one_.begin, end < one_.end ? end : one_.end, false, false};
      span.first = span.begin == begin, span.last = span.end == end;
      if (span.begin >= span.end) continue;  // an empty sequence
      order_ += direction_;
      return true;
    }
    return false;
  }

 private:
  __device__ __forceinline__ int64_t sequence(int64_t order) const {
    return scan_.reverse ? scan_.sequences - 1 - order : order;
  }
  __device__ __forceinline__ int64_t offset(int64_t n) const {  // device data: any value must stay in bounds
    const int64_t at = load<Traffic::kIndex, 1>(scan_.offsets + n).at[0];
    return at < 0 ? 0 : (at < scan_.time ? at : scan_.time);
  }
  __device__ __forceinline__ void bounds(int64_t n, int64_t& begin, int64_t& end) const {
    begin = offset(n), end = offset(n + 1);
    if (end < begin) end = begin;
    if (scan_.reverse) {
      const int64_t left = begin;
      begin = scan_.time - end, end = scan_.time - left;
    }
  }
  // In scan order, the first sequence that ends after the job begins; from the right, the last that begins before its
  // end.
  __device__ __forceinline__ int64_t find() const {
    int64_t low = 0, high = scan_.sequences;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      int64_t begin, end;
      bounds(sequence(middle), begin, end);
      const bool before = direction_ > 0 ? end <= one_.begin : begin < one_.end;
      if (before) low = middle + 1;
      else high = middle;
    }
    return direction_ > 0 ? low : low - 1;
  }

  const Scan& scan_;
  const int direction_;
  Span one_;
  int64_t order_ = 0;
  bool packed_ = false, done_ = false;
};

// ------------------------------------------------------------------------------------------------ streams and states

// A stream along the scan of one row, from channel d on.
template <class T>
struct Row {
  T* data;
  int64_t first, step;  // offset of position 0, and from one position to the next

  __device__ __forceinline__ Row(const Scan& scan, const Stream& stream, int64_t row, int64_t d)
      : data(static_cast<T*>(stream.data)),
        first(row * stream.batch + (scan.reverse ? scan.time - 1 : 0) * stream.time + d),
        step(scan.reverse ? -stream.time : stream.time) {}
  __device__ __forceinline__ T* at(int64_t position) const { return data + (first + position * step); }
};

// Calls each(i, k) for every input i that is a stream, the k-th of them.
template <class F, class Each>
__device__ __forceinline__ void for_streams(Each each) {
  int k = 0;
#pragma unroll
  for (int i = 0; i < F::kInputs; ++i)
    if (!F::per_channel(i)) each(i, k++);
}

// The inputs that come per channel, at channels [d, d + W).
template <class F>
struct ChannelInputs {
  typename F::States value[F::kInputs];

  ChannelInputs() = default;
  __device__ __forceinline__ ChannelInputs(const Scan& scan, int64_t d) {
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i)
      if (F::per_channel(i))
        value[i] = load<Traffic::kState, F::W>(static_cast<const typename F::S*>(scan.in[i].channel) + d);
  }
};

// Calls each<U>(position) for the aligned tiles in [begin, end), and each<1> for the steps before and after them.
template <int U, class Each>
__device__ __forceinline__ void for_tiles(int64_t begin, int64_t end, Each each) {
  for (int64_t position = begin; position < end;) {
    if (position % U == 0 && position + U <= end) each.template operator()<U>(position), position += U;
    else each.template operator()<1>(position), position += 1;
  }
}
template <int U, class Each>
__device__ __forceinline__ void for_tiles_from_right(int64_t begin, int64_t end, Each each) {
  for (int64_t position = end; position > begin;) {
    if (position % U == 0 && position - U >= begin) each.template operator()<U>(position -= U);
    else each.template operator()<1>(position -= 1);
  }
}

// U steps of one stream, as they lie in memory.
template <class F, int U>
__device__ __forceinline__ void load_steps(const Row<const typename F::T>& stream, int64_t position,
                                           Vector<typename F::T, F::W>* raw, int stride = 1) {
  const typename F::T* at = stream.at(position);
#pragma unroll
  for (int t = 0; t < U; ++t, at = advance(at, stream.step)) raw[t * stride] = load<Traffic::kStream, F::W>(at);
}

// U steps of every stream input.
template <class F, int U>
struct Tile {
  Vector<typename F::T, F::W> raw[U][F::kStreams];

  Tile() = default;
  __device__ __forceinline__ Tile(const Scan& scan, int64_t row, int64_t d, int64_t position) {
    for_streams<F>(
        [&](int i, int k) { load_steps<F, U>({scan, scan.in[i].stream, row, d}, position, &raw[0][k], F::kStreams); });
  }
  // The inputs of step t at channel w of the thread.
  __device__ __forceinline__ void inputs(int t, int w, const ChannelInputs<F>& channel, typename F::S* x) const {
    int k = 0;
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i) x[i] = F::per_channel(i) ? channel.value[i].at[w] : widen(raw[t][k++].at[w]);
  }
};

template <class S>
__device__ __forceinline__ S* state_row(void* base, int64_t row, int64_t channels, int64_t d) {
  return static_cast<S*>(base) + row * channels + d;
}
template <class F>
__device__ __forceinline__ typename F::States load_states(const void* base, int64_t row, int64_t channels, int64_t d) {
  using S = typename F::S;
  return load<Traffic::kState, F::W>(static_cast<const S*>(base) + row * channels + d);
}
template <class F>
__device__ __forceinline__ void store_states(void* base, int64_t row, int64_t channels, int64_t d,
                                             const typename F::States& s) {
  store<Traffic::kState>(state_row<typename F::S>(base, row, channels, d), s);
}
template <class F>
__device__ __forceinline__ typename F::States all(typename F::S value) {
  typename F::States s;
#pragma unroll
  for (int w = 0; w < F::W; ++w) s.at[w] = value;
  return s;
}

template <class F>
__device__ __forceinline__ typename F::States load_alpha(const Scan& scan, int64_t d) {
  return scan.alpha ? load_states<F>(scan.alpha, 0, 0, d) : all<F>(1);
}
template <class F>
__device__ __forceinline__ typename F::States initial_state(const Scan& scan, int64_t sequence, int64_t d) {
  return scan.initial ? load_states<F>(scan.initial, sequence, scan.channels, d) : all<F>(0);
}
// The state before the first step of a span that begins a sequence; a NaN alpha makes its channel NaN.
template <class F>
__device__ __forceinline__ typename F::States enter(const Scan& scan, const Span& span, int64_t d,
                                                    const typename F::States& alpha) {
  typename F::States s = initial_state<F>(scan, span.sequence, d);
  if (span.begin < span.end)
#pragma unroll
    for (int w = 0; w < F::W; ++w) s.at[w] = alpha.at[w] == alpha.at[w] ? s.at[w] : alpha.at[w];
  return s;
}

// The row of `checkpoints` that holds the state entering a position, a multiple of the chunk > 0.
__device__ __forceinline__ int64_t checkpoint_row(const Scan& scan, const Plan& plan, const Span& span,
                                                  int64_t position) {
  return span.row * scan.checkpoint_rows + plan.chunk_divisor(position) - 1;
}

// The codes of the 16 steps from a position on, a multiple of 16.
template <class F>
__device__ __forceinline__ int32_t* event_row(const Scan& scan, int64_t row, int64_t position, int64_t d) {
  return scan.events + (row * scan.event_rows + position / kEventsPerWord) * scan.channels + d;
}
template <class F>
__device__ __forceinline__ void store_events(const Scan& scan, int64_t row, int64_t position, int64_t d,
                                             const Vector<int32_t, F::W>& words) {
  store<Traffic::kEvents>(event_row<F>(scan, row, position, d), words);
}

// The codes of a row as a thread comes past them.
template <class F>
class Events {
 public:
  // The codes from a position on, the first in the low bits.
  __device__ __forceinline__ Vector<int32_t, F::W> at(const Scan& scan, int64_t row, int64_t position, int64_t d) {
    const int64_t first = position / kEventsPerWord * kEventsPerWord;
    if (first != first_) {
      words_ = load<Traffic::kEvents, F::W>(static_cast<const int32_t*>(event_row<F>(scan, row, first, d)));
      first_ = first;
    }
    Vector<int32_t, F::W> codes;
#pragma unroll
    for (int w = 0; w < F::W; ++w) codes.at[w] = words_.at[w] >> 2 * int(position - first);
    return codes;
  }

 private:
  Vector<int32_t, F::W> words_;
  int64_t first_ = -1;
};

// Saves the states that enter the chunks of a span, as the scan comes past them.
template <class F>
struct Checkpoints {
  const Scan& scan;
  const Plan& plan;
  const Span& span;
  const int64_t d;
  int64_t next;  // position of the next one

  __device__ __forceinline__ Checkpoints(const Scan& scan, const Plan& plan, const Span& span, int64_t d)
      : scan(scan), plan(plan), span(span), d(d), next(plan.chunk_divisor(span.begin) * scan.chunk) {
    if (span.first || next < span.begin) next += scan.chunk;
  }
  __device__ __forceinline__ void pass(int64_t position, const typename F::States& s) {
    if (position != next) return;
    if (scan.checkpoints && position < span.end)
      store_states<F>(scan.checkpoints, checkpoint_row(scan, plan, span, position), scan.channels, d, s);
    next += scan.chunk;
  }
};

template <class F, int U>
__device__ __forceinline__ void step_all(const typename F::Cell& cell, const Tile<F, U>& tile, int t,
                                         const ChannelInputs<F>& channel, typename F::States& s) {
#pragma unroll
  for (int w = 0; w < F::W; ++w) {
    typename F::S x[F::kInputs];
    tile.inputs(t, w, channel, x);
    s.at[w] = cell.step(x, s.at[w]);
  }
}
template <class F>
__device__ __forceinline__ void store_h(typename F::T* at, const typename F::States& alpha,
                                        const typename F::States& s) {
  typename F::States h;
#pragma unroll
  for (int w = 0; w < F::W; ++w) h.at[w] = real(alpha.at[w]) * s.at[w];
  store<Traffic::kStream>(at, narrow<typename F::T>(h));
}

// ------------------------------------------------------------------------------------------------ forward

// h, final states and checkpoints from the streams. Wide: whole sequences. Chunked: from the jobs' entry states.
template <class F>
__global__ void __launch_bounds__(kForwardThreads, 4) forward(const __grid_constant__ Call<typename F::S> call) {
  const auto& [scan, plan, work, across] = call;
  const auto [job, d] = place<F>(call);
  if (job >= plan.jobs) return;
  const typename F::Cell cell(scan.epsilon, scan.surrogate_scale);
  const ChannelInputs<F> channel(scan, d);
  const typename F::States alpha = load_alpha<F>(scan, d);

  Spans spans(scan, plan, job, 1);
  for (Span span; spans.next(span);) {
    typename F::States s =
        span.first ? enter<F>(scan, span, d, alpha) : load_states<F>(work.entry, job, scan.channels, d);
    const Row<typename F::T> h(scan, scan.h, span.row, d);
    Checkpoints<F> checkpoints(scan, plan, span, d);
    checkpoints.pass(span.begin, s);
    for_tiles<kForwardTile>(span.begin, span.end, [&]<int U>(int64_t position) {
      const Tile<F, U> tile(scan, span.row, d, position);
      typename F::T* out = h.at(position);
#pragma unroll
      for (int t = 0; t < U; ++t, out = advance(out, h.step)) {
        step_all<F>(cell, tile, t, channel, s);
        store_h<F>(out, alpha, s);
      }
      checkpoints.pass(position + U, s);
    });
    if (span.last) store_states<F>(scan.final_state, span.sequence, scan.channels, d, s);
  }
}

// Chunked, first: each job as one map of the state, and its events.
template <class F>
__global__ void __launch_bounds__(kForwardThreads, 4) summarize(const __grid_constant__ Call<typename F::S> call) {
  const auto& [scan, plan, work, across] = call;
  const auto [job, d] = place<F>(call);
  if (job >= plan.jobs) return;
  const typename F::Cell cell(scan.epsilon, scan.surrogate_scale);
  const ChannelInputs<F> channel(scan, d);
  const typename F::States alpha = load_alpha<F>(scan, d);

  typename F::States a = all<F>(1), u = all<F>(0);
  bool forget = false;
  Vector<int32_t, F::W> words = {};
  int64_t word = -1;  // position of the words' first step; a word may hold steps of several spans
  Spans spans(scan, plan, job, 1);
  for (Span span; spans.next(span);) {
    if (span.first) u = enter<F>(scan, span, d, alpha), forget = true;
    for_tiles<kForwardTile>(span.begin, span.end, [&]<int U>(int64_t position) {
      const Tile<F, U> tile(scan, span.row, d, position);
      const int before = position % kEventsPerWord;
      if constexpr (F::Cell::kEvents) {
        if (position - before != word) {
          if (word >= 0) store_events<F>(scan, span.row, word, d, words);
          word = position - before;
          words = {};
        }
      }
#pragma unroll
      for (int w = 0; w < F::W; ++w) {
        int32_t codes = 0;
#pragma unroll
        for (int t = 0; t < U; ++t) {
          typename F::S x[F::kInputs];
          tile.inputs(t, w, channel, x);
          u.at[w] = cell.step(x, u.at[w]);
          a.at[w] = conj(cell.pull(x, conj(a.at[w])));
          if constexpr (F::Cell::kEvents) codes |= cell.encode(x) << 2 * t;
        }
        words.at[w] |= codes << 2 * before;
      }
    });
  }
  if constexpr (F::Cell::kEvents)
    if (word >= 0) store_events<F>(scan, plan.segments_divisor(job), word, d, words);
  store_states<F>(work.factor, job, scan.channels, d, forget ? all<F>(forgets<typename F::S>()) : a);
  store_states<F>(work.offset, job, scan.channels, d, u);
}

// Chunked, last: h, final states and checkpoints from the events and the jobs' entry states.
template <class F>
__global__ void __launch_bounds__(kForwardThreads, 4) expand(const __grid_constant__ Call<typename F::S> call) {
  const auto& [scan, plan, work, across] = call;
  const auto [job, d] = place<F>(call);
  if (job >= plan.jobs) return;
  const typename F::Cell cell(scan.epsilon, scan.surrogate_scale);
  const typename F::States alpha = load_alpha<F>(scan, d);

  Events<F> events;
  Spans spans(scan, plan, job, 1);
  for (Span span; spans.next(span);) {
    typename F::States s =
        span.first ? enter<F>(scan, span, d, alpha) : load_states<F>(work.entry, job, scan.channels, d);
    const Row<typename F::T> h(scan, scan.h, span.row, d);
    Checkpoints<F> checkpoints(scan, plan, span, d);
    checkpoints.pass(span.begin, s);
    for_tiles<kForwardTile>(span.begin, span.end, [&]<int U>(int64_t position) {
      const Vector<int32_t, F::W> codes = events.at(scan, span.row, position, d);
      typename F::T* out = h.at(position);
#pragma unroll
      for (int t = 0; t < U; ++t, out = advance(out, h.step)) {
#pragma unroll
        for (int w = 0; w < F::W; ++w) s.at[w] = cell.step_event(codes.at[w] >> 2 * t & 3, s.at[w]);
        store_h<F>(out, alpha, s);
      }
      checkpoints.pass(position + U, s);
    });
    if (span.last) store_states<F>(scan.final_state, span.sequence, scan.channels, d, s);
  }
}

// ------------------------------------------------------------------------------------------------ between the jobs

template <class S>
__device__ __forceinline__ S apply(S a, S u, S s) {
  if (a != a) return u;  // forgets
  if (s != s) return s;
  return a == S(0) ? u : a * s + u;
}

// Chunked, between: the entry state of every job of a row, from the left; for the adjoint (direction -1) m from the
// right. A block takes kLanes channels of a row; each group of its threads composes `run` jobs, then all groups before
// it give its entry. The order depends on sizes only.
template <class S>
__global__ void __launch_bounds__(kLanes* kGroups)
    carry(Workspace<S> work, int64_t segments, int64_t run, int64_t channels, int direction) {
  S* const run_factor = reinterpret_cast<S*>(shared_memory());  // [groups, kLanes]
  S* const run_offset = run_factor + blockDim.y * kLanes;
  const unsigned blocks = unsigned((channels + kLanes - 1) / kLanes);
  const int64_t row = blockIdx.x / blocks, d = int64_t(blockIdx.x % blocks) * kLanes + threadIdx.x;
  const int64_t begin = threadIdx.y * run;
  const int64_t end = d < channels ? (begin + run < segments ? begin + run : segments) : 0;
  const auto at = [&](int64_t i) { return (row * segments + (direction > 0 ? i : segments - 1 - i)) * channels + d; };
  const auto read = [&](const S* from, int64_t i) { return load<Traffic::kState, 1>(from + at(i)).at[0]; };

  S a = 1, u = 0;
#pragma unroll 4
  for (int64_t i = begin; i < end; ++i) {
    const S factor = read(work.factor, i);
    u = apply(factor, read(work.offset, i), u);
    a = factor * a;
  }
  run_factor[threadIdx.y * kLanes + threadIdx.x] = a;
  run_offset[threadIdx.y * kLanes + threadIdx.x] = u;
  __syncthreads();
  S s = 0;
  for (int g = 0; g < int(threadIdx.y); ++g)
    s = apply(run_factor[g * kLanes + threadIdx.x], run_offset[g * kLanes + threadIdx.x], s);
#pragma unroll 4
  for (int64_t i = begin; i < end; ++i) {
    store<Traffic::kState>(work.entry + at(i), Vector<S, 1>{{s}});
    s = apply(read(work.factor, i), read(work.offset, i), s);
  }
}

// total[d] = the sum over rows of sums[row, which, d], always in the same order.
template <class S>
__global__ void __launch_bounds__(kLanes* kGroups)
    reduce(const S* sums, int64_t rows, int count, int which, int64_t channels, S* total) {
  S* const partial = reinterpret_cast<S*>(shared_memory());  // [kGroups, kLanes]
  const int64_t d = int64_t(blockIdx.x) * kLanes + threadIdx.x;
  S sum = 0;
  if (d < channels)
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kGroups)
      sum += load<Traffic::kState, 1>(sums + (row * count + which) * channels + d).at[0];
  partial[threadIdx.y * kLanes + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || d >= channels) return;
  for (int g = 1; g < kGroups; ++g) sum += partial[g * kLanes + threadIdx.x];
  store<Traffic::kState>(total + d, Vector<S, 1>{{sum}});
}

// ------------------------------------------------------------------------------------------------ backward

// Chunked, first: each job as one map of m, from the right. From the events, or from the streams again.
template <class F, bool kFromEvents>
__global__ void __launch_bounds__(kForwardThreads, 4)
    summarize_adjoint(const __grid_constant__ Call<typename F::S> call) {
  const auto& [scan, plan, work, across] = call;
  const auto [job, d] = place<F>(call);
  if (job >= plan.jobs) return;
  const typename F::Cell cell(scan.epsilon, scan.surrogate_scale);
  const ChannelInputs<F> channel(scan, d);
  const typename F::States alpha = load_alpha<F>(scan, d);

  typename F::States a = all<F>(1), m = all<F>(0);
  bool forget = false;
  Events<F> events;
  Spans spans(scan, plan, job, -1);
  for (Span span; spans.next(span);) {
    if (span.last) m = load_states<F>(scan.grad_final, span.sequence, scan.channels, d), forget = true;
    const Row<const typename F::T> g(scan, scan.grad_h, span.row, d);
    for_tiles_from_right<kForwardTile>(span.begin, span.end, [&]<int U>(int64_t position) {
      Vector<typename F::T, F::W> grad[U];
      load_steps<F, U>(g, position, grad);
      [[maybe_unused]] Tile<F, kFromEvents ? 1 : U> tile;
      [[maybe_unused]] Vector<int32_t, F::W> codes;
      if constexpr (kFromEvents) codes = events.at(scan, span.row, position, d);
      else tile = Tile<F, U>(scan, span.row, d, position);
#pragma unroll
      for (int t = U - 1; t >= 0; --t) {
#pragma unroll
        for (int w = 0; w < F::W; ++w) {
          const typename F::S lambda = real(alpha.at[w]) * widen(grad[t].at[w]) + m.at[w];
          if constexpr (kFromEvents) {
            const int code = codes.at[w] >> 2 * t & 3;
            m.at[w] = cell.pull_event(code, lambda);
            a.at[w] = cell.pull_event(code, a.at[w]);
          } else {
            typename F::S x[F::kInputs];
            tile.inputs(t, w, channel, x);
            m.at[w] = cell.pull(x, lambda);
            a.at[w] = cell.pull(x, a.at[w]);
          }
        }
      }
    });
  }
  store_states<F>(work.factor, job, scan.channels, d, forget ? all<F>(forgets<typename F::S>()) : a);
  store_states<F>(work.offset, job, scan.channels, d, m);
}

// Room of one thread of `backward` in shared memory, side by side with its neighbours': what a chunk needs beyond
// registers. Loops over it are not unrolled: the gradient of a step is long.
template <class F, bool kFromEvents>
class Room {
 public:
  using Elements = Vector<typename F::T, F::W>;
  static constexpr int U = kBackwardTile, kThreads = kFromEvents ? 64 : 32;
  // Streams are read once, so those of a whole chunk stay if they give its states; else a tile's.
  static constexpr __host__ __device__ int kept_steps(int64_t chunk) { return kFromEvents ? U : int(chunk); }
  static constexpr __host__ int64_t bytes(int64_t chunk) {
    return kThreads * ((2 * F::kSums + chunk / U + U) * sizeof(typename F::States) +
                       (kept_steps(chunk) * F::kStreams + U) * sizeof(Elements));
  }
  __device__ __forceinline__ explicit Room(const Scan& scan)
      : factors_(reinterpret_cast<typename F::States*>(shared_memory()) + threadIdx.x),
        totals_(factors_ + F::kSums * kThreads),
        states_(totals_ + F::kSums * kThreads),
        grads_(reinterpret_cast<Elements*>(states_ - threadIdx.x + U * kThreads) + threadIdx.x),
        streams_(grads_ + U * kThreads),
        entries_(reinterpret_cast<typename F::States*>(streams_ - threadIdx.x +
                                                       kept_steps(scan.chunk) * F::kStreams * kThreads) +
                 threadIdx.x) {}

  // Alpha, then the inputs that come per channel; and the sums of their gradients over all chunks so far.
  __device__ __forceinline__ typename F::States& factor(int i) const { return factors_[i * kThreads]; }
  __device__ __forceinline__ typename F::States& total(int i) const { return totals_[i * kThreads]; }
  // The state that enters tile i of the chunk, and step t of the tile at hand.
  __device__ __forceinline__ typename F::States& entry(int i) const { return entries_[i * kThreads]; }
  __device__ __forceinline__ typename F::States& state(int t) const { return states_[t * kThreads]; }
  // grad_h of step t of the tile at hand, and stream k of step t of what is kept.
  __device__ __forceinline__ Elements& grad(int t) const { return grads_[t * kThreads]; }
  __device__ __forceinline__ Elements& stream(int k, int t) const { return streams_[(t * F::kStreams + k) * kThreads]; }

 private:
  typename F::States* const factors_;
  typename F::States* const totals_;
  typename F::States* const states_;
  Elements* const grads_;
  Elements* const streams_;
  typename F::States* const entries_;
};

// The steps [low, high) of a tile that lie in [begin, end).
struct Part {
  int low, high;
  __device__ __forceinline__ Part(int64_t begin, int64_t end, int64_t position, int steps)
      : low(begin > position ? int(begin - position) : 0), high(end - position < steps ? int(end - position) : steps) {}
};

// Loads those steps of a stream together, and puts them where slot(t) says.
template <class F, int U, class Slot>
__device__ __forceinline__ void stage(const Row<const typename F::T>& stream, int64_t position, Part part, Slot slot) {
  Vector<typename F::T, F::W> raw[U];
  const typename F::T* at = stream.at(position);
#pragma unroll
  for (int t = 0; t < U; ++t, at = advance(at, stream.step))
    if (part.low <= t && t < part.high) raw[t] = load<Traffic::kStream, F::W>(at);
#pragma unroll
  for (int t = 0; t < U; ++t)
    if (part.low <= t && t < part.high) slot(t) = raw[t];
}

// Gradients, chunk by chunk from the right: first the states from the chunk's saved boundary state, then m.
// Wide: whole sequences, from the streams. Chunked: from the jobs' entry m; the states from the events, if they are.
template <class F, bool kFromEvents>
__global__ void __launch_bounds__(Room<F, kFromEvents>::kThreads, 1)
    backward(const __grid_constant__ Call<typename F::S> call) {
  using S = typename F::S;
  constexpr int U = kBackwardTile;
  const auto& [scan, plan, work, across] = call;
  const auto [row, d] = place<F>(call);
  if (row >= plan.sum_rows) return;
  const typename F::Cell cell(scan.epsilon, scan.surrogate_scale);
  const Room<F, kFromEvents> room(scan);
  // Calls each(i, k) for every input i that comes per channel, row k of the room's factors and sums.
  const auto for_channels = [](auto each) {
    int k = 1;
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i)
      if (F::per_channel(i)) each(i, k++);
  };
  const ChannelInputs<F> given(scan, d);
  room.factor(0) = load_alpha<F>(scan, d);
  for_channels([&](int i, int k) { room.factor(k) = given.value[i]; });
#pragma unroll
  for (int i = 0; i < F::kSums; ++i) room.total(i) = all<F>(0);

  // Inputs of kept step t; the state after it.
  const auto inputs = [&](int t, Tile<F, 1>& tile, ChannelInputs<F>& channel) {
    for_streams<F>([&](int, int k) { tile.raw[0][k] = room.stream(k, t); });
    for_channels([&](int i, int k) { channel.value[i] = room.factor(k); });
  };
  const auto step = [&](int t, typename F::States& s) {
    Tile<F, 1> tile;
    ChannelInputs<F> channel;
    inputs(t, tile, channel);
    step_all<F>(cell, tile, 0, channel, s);
  };
  const auto stage_streams = [&](int64_t row, int64_t position, Part part, int first) {
    for_streams<F>([&](int i, int k) {
      stage<F, U>({scan, scan.in[i].stream, row, d}, position, part,
                  [&](int t) -> auto& { return room.stream(k, first + t); });
    });
  };

  for (int64_t job = row; job < plan.jobs; job += plan.sum_rows) {
    Spans spans(scan, plan, job, -1);
    for (Span span; spans.next(span);) {
      typename F::States m = span.last ? load_states<F>(scan.grad_final, span.sequence, scan.channels, d)
                                       : load_states<F>(work.entry, job, scan.channels, d);
      for (int64_t end = span.end; end > span.begin;) {
        const int64_t chunk = plan.chunk_divisor(end - 1) * scan.chunk, begin = chunk > span.begin ? chunk : span.begin;
        typename F::States s =
            span.first && begin == span.begin
                ? initial_state<F>(scan, span.sequence, d)
                : load_states<F>(scan.checkpoints, checkpoint_row(scan, plan, span, chunk), scan.channels, d);
        Events<F> events;
        for (int64_t position = begin / U * U; position < end; position += U) {
          const Part part(begin, end, position, U);
          const int first = int(position - chunk);
          room.entry(first / U) = s;
          if constexpr (kFromEvents) {
            const Vector<int32_t, F::W> codes = events.at(scan, span.row, position, d);
#pragma unroll 1
            for (int t = part.low; t < part.high; ++t)
#pragma unroll
              for (int w = 0; w < F::W; ++w) s.at[w] = cell.step_event(codes.at[w] >> 2 * t & 3, s.at[w]);
          } else {
            stage_streams(span.row, position, part, first);
#pragma unroll 1
            for (int t = part.low; t < part.high; ++t) step(first + t, s);
          }
        }

        typename F::States sums[F::kSums];
#pragma unroll
        for (int i = 0; i < F::kSums; ++i) sums[i] = all<F>(0);
        for (int64_t position = (end - 1) / U * U; position + U > begin; position -= U) {
          const Part part(begin, end, position, U);
          const int first = kFromEvents ? 0 : int(position - chunk);
          stage<F, U>({scan, scan.grad_h, span.row, d}, position, part, [&](int t) -> auto& { return room.grad(t); });
          if constexpr (kFromEvents) stage_streams(span.row, position, part, first);
          s = room.entry(int(position - chunk) / U);
#pragma unroll 1
          for (int t = part.low; t < part.high; ++t) {
            room.state(t) = s;
            step(first + t, s);
          }
          typename F::T* into[F::kStreams];
          for_streams<F>([&](int i, int k) {
            into[k] = Row<typename F::T>(scan, scan.grad_in[i], span.row, d).at(position + part.high - 1);
          });
#pragma unroll 1
          for (int t = part.high - 1; t >= part.low; --t) {
            Tile<F, 1> tile;
            ChannelInputs<F> channel;
            inputs(first + t, tile, channel);
            const typename F::States before = room.state(t), alpha = room.factor(0);
            const Vector<typename F::T, F::W> grad = room.grad(t);
            typename F::States gradients[F::kInputs];
#pragma unroll
            for (int w = 0; w < F::W; ++w) {
              S x[F::kInputs], dx[F::kInputs];
              tile.inputs(0, w, channel, x);
              const S g = widen(grad.at[w]);
              m.at[w] = cell.vjp(x, before.at[w], real(alpha.at[w]) * g + m.at[w], dx);
              sums[0].at[w] += g * s.at[w];
              for_channels([&](int i, int k) { sums[k].at[w] += dx[i]; });
              for_streams<F>([&](int i, int) { gradients[i].at[w] = dx[i]; });
            }
            s = before;
            for_streams<F>([&](int i, int k) {
              store<Traffic::kStream>(into[k], narrow<typename F::T>(gradients[i]));
              into[k] += scan.reverse ? scan.grad_in[i].time : -scan.grad_in[i].time;
            });
          }
        }
#pragma unroll
        for (int i = 0; i < F::kSums; ++i)
#pragma unroll
          for (int w = 0; w < F::W; ++w) room.total(i).at[w] += sums[i].at[w];
        end = begin;
      }
      if (span.first) store_states<F>(scan.grad_initial, span.sequence, scan.channels, d, m);
    }
  }
  if (plan.sums > 0)
#pragma unroll
    for (int i = 0; i < F::kSums; ++i) store_states<F>(work.sums, row * F::kSums + i, scan.channels, d, room.total(i));
}

}  // namespace mru::cuda
