// The CUDA kernels: a scan over a cell (csrc/cells), threads along the channels, time inside a thread.
//
//   B batch, T time, D channels     W channels of a thread, side by side: 16 bytes of a stream, or 1
//   row        of a batch; a packed call has one          position  of the scan in a row: 0 is the first step scanned
//   sequence   n; begins and ends inside a row            job       the positions that a thread scans (plan.h)
//   span       a job's part of one sequence               tile      U steps, aligned: their loads are issued together
//   s, m       state; a lambda of the step to the right   a, u      a job as one map: s -> a s + u; m -> a m + u
//
// Threads share nothing, except in `carry` and `reduce`. A NaN state stays NaN; nothing is multiplied by a factor 0.
#pragma once
#include "memory.cuh"
#include "plan.h"

namespace mru::cuda {

constexpr int kForwardThreads = 64;
constexpr int kForwardTile = 8, kBackwardTile = 8;
constexpr int kLanes = 32, kGroups = 32;  // threads of `carry` and `reduce`: channels, rows at once

// A factor of a job in which a sequence begins (for the adjoint: ends): what came before is forgotten, NaN included.
// Other factors are in [0, 1].
constexpr int kForget = -1;

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
};

// Device memory that the launches of one call share.
template <class S>
struct Workspace {
  S* factor;  // [jobs, D]
  S* offset;  // [jobs, D]
  S* entry;   // [jobs, D]: s or m where the job begins (for the adjoint: at its right)
  S* sums;    // [sum_rows, sums, D]
};

// ------------------------------------------------------------------------------------------------ where a thread is

__device__ __forceinline__ int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

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
      const int64_t row = job / plan.segments, begin = job % plan.segments * scan.segment;
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
  T* base;
  int64_t step;

  __device__ __forceinline__ Row(const Scan& scan, const Stream& stream, int64_t row, int64_t d)
      : base(static_cast<T*>(stream.data) + row * stream.batch + (scan.reverse ? scan.time - 1 : 0) * stream.time + d),
        step(scan.reverse ? -stream.time : stream.time) {}
  __device__ __forceinline__ T* at(int64_t position) const { return base + position * step; }
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

  __device__ __forceinline__ ChannelInputs(const Scan& scan, int64_t d) {
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i)
      if (F::per_channel(i))
        value[i] = load<Traffic::kState, F::W>(static_cast<const typename F::S*>(scan.in[i].channel) + d);
  }
};

// The steps of a tile that belong to the span.
struct Valid {
  int low, high;
  __device__ __forceinline__ Valid(int64_t begin, int64_t end, int64_t position, int steps)
      : low(begin > position ? int(begin - position) : 0),
        high(end - position < steps ? int(end - position) : steps) {}
  __device__ __forceinline__ bool operator()(int t) const { return low <= t && t < high; }
};

// U steps of every stream input, as they lie in memory; valid steps only.
template <class F, int U>
struct Tile {
  using Elements = Vector<typename F::T, F::W>;
  Elements raw[U][F::kStreams];

  __device__ __forceinline__ void load_streams(const Scan& scan, int64_t row, int64_t d, int64_t position,
                                               Valid valid) {
    for_streams<F>([&](int i, int k) {
      const Row<const typename F::T> stream(scan, scan.in[i].stream, row, d);
      const typename F::T* at = stream.at(position);
#pragma unroll
      for (int t = 0; t < U; ++t, at += stream.step)
        if (valid(t)) raw[t][k] = load<Traffic::kStream, F::W>(at);
    });
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
__device__ __forceinline__ int64_t checkpoint_row(const Scan& scan, const Span& span, int64_t position) {
  return span.row * scan.checkpoint_rows + position / scan.chunk - 1;
}

// The codes of the 16 steps from a position on, a multiple of 16.
template <class F>
__device__ __forceinline__ int32_t* event_row(const Scan& scan, int64_t row, int64_t position, int64_t d) {
  return scan.events + (row * scan.event_rows + position / kEventsPerWord) * scan.channels + d;
}
template <class F>
__device__ __forceinline__ Vector<int32_t, F::W> load_events(const Scan& scan, int64_t row, int64_t position,
                                                             int64_t d) {
  return load<Traffic::kEvents, F::W>(static_cast<const int32_t*>(event_row<F>(scan, row, position, d)));
}
template <class F>
__device__ __forceinline__ void store_events(const Scan& scan, int64_t row, int64_t position, int64_t d,
                                             const Vector<int32_t, F::W>& words) {
  store<Traffic::kEvents>(event_row<F>(scan, row, position, d), words);
}

// Saves the states that enter the chunks of a span, as the scan comes past them.
template <class F>
struct Checkpoints {
  const Scan& scan;
  const Span& span;
  const int64_t d;
  int64_t next;  // position of the next one

  __device__ __forceinline__ Checkpoints(const Scan& scan, const Span& span, int64_t d)
      : scan(scan), span(span), d(d), next(span.begin / scan.chunk * scan.chunk) {
    if (span.first || next < span.begin) next += scan.chunk;
  }
  __device__ __forceinline__ void pass(int64_t position, const typename F::States& s) {
    if (position != next) return;
    if (scan.checkpoints && position < span.end)
      store_states<F>(scan.checkpoints, checkpoint_row(scan, span, position), scan.channels, d, s);
    next += scan.chunk;
  }
};

template <class F>
__device__ __forceinline__ void store_h(typename F::T* at, const typename F::States& alpha,
                                        const typename F::States& s) {
  typename F::States h;
#pragma unroll
  for (int w = 0; w < F::W; ++w) h.at[w] = alpha.at[w] * s.at[w];
  store<Traffic::kStream>(at, narrow<typename F::T>(h));
}

// ------------------------------------------------------------------------------------------------ forward

// h, final states and checkpoints from the streams. Wide: whole sequences. Chunked: from the jobs' entry states.
template <class F>
__global__ void __launch_bounds__(kForwardThreads)
    forward(const __grid_constant__ Scan scan, const __grid_constant__ Plan plan, Workspace<typename F::S> work) {
  constexpr int U = kForwardTile;
  const int64_t across = scan.channels / F::W, job = thread_index() / across, d = thread_index() % across * F::W;
  if (job >= plan.jobs) return;
  const typename F::Cell cell(scan.epsilon, scan.surrogate_scale);
  const ChannelInputs<F> channel(scan, d);
  const typename F::States alpha = load_alpha<F>(scan, d);

  Spans spans(scan, plan, job, 1);
  for (Span span; spans.next(span);) {
    typename F::States s =
        span.first ? enter<F>(scan, span, d, alpha) : load_states<F>(work.entry, job, scan.channels, d);
    const Row<typename F::T> h(scan, scan.h, span.row, d);
    Checkpoints<F> checkpoints(scan, span, d);
    checkpoints.pass(span.begin, s);
    for (int64_t position = span.begin / U * U; position < span.end; position += U) {
      const Valid valid(span.begin, span.end, position, U);
      Tile<F, U> tile;
      tile.load_streams(scan, span.row, d, position, valid);
#pragma unroll
      for (int t = 0; t < U; ++t) {
        if (!valid(t)) continue;
#pragma unroll
        for (int w = 0; w < F::W; ++w) {
          typename F::S x[F::kInputs];
          tile.inputs(t, w, channel, x);
          s.at[w] = cell.step(x, s.at[w]);
        }
        store_h<F>(h.at(position + t), alpha, s);
      }
      checkpoints.pass(position + U, s);
    }
    if (span.last) store_states<F>(scan.final_state, span.sequence, scan.channels, d, s);
  }
}

// Chunked, first: each job as one map of the state, and its events.
template <class F>
__global__ void __launch_bounds__(kForwardThreads)
    summarize(const __grid_constant__ Scan scan, const __grid_constant__ Plan plan, Workspace<typename F::S> work) {
  constexpr int U = kForwardTile;
  const int64_t across = scan.channels / F::W, job = thread_index() / across, d = thread_index() % across * F::W;
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
    for (int64_t position = span.begin / U * U; position < span.end; position += U) {
      const Valid valid(span.begin, span.end, position, U);
      Tile<F, U> tile;
      tile.load_streams(scan, span.row, d, position, valid);
      if constexpr (F::Cell::kEvents) {
        if (position / kEventsPerWord * kEventsPerWord != word) {
          if (word >= 0) store_events<F>(scan, span.row, word, d, words);
          word = position / kEventsPerWord * kEventsPerWord;
          words = {};
        }
      }
#pragma unroll
      for (int w = 0; w < F::W; ++w) {
        int32_t codes = 0;
#pragma unroll
        for (int t = 0; t < U; ++t) {
          if (!valid(t)) continue;
          typename F::S x[F::kInputs];
          tile.inputs(t, w, channel, x);
          u.at[w] = cell.step(x, u.at[w]);
          a.at[w] = cell.pull(x, a.at[w]);
          if constexpr (F::Cell::kEvents) codes |= cell.encode(x) << 2 * t;
        }
        words.at[w] |= codes << 2 * int(position % kEventsPerWord);
      }
    }
  }
  if constexpr (F::Cell::kEvents)
    if (word >= 0) store_events<F>(scan, job / plan.segments, word, d, words);
  store_states<F>(work.factor, job, scan.channels, d, forget ? all<F>(kForget) : a);
  store_states<F>(work.offset, job, scan.channels, d, u);
}

// Chunked, last: h, final states and checkpoints from the events and the jobs' entry states.
template <class F>
__global__ void __launch_bounds__(kForwardThreads)
    expand(const __grid_constant__ Scan scan, const __grid_constant__ Plan plan, Workspace<typename F::S> work) {
  constexpr int U = kEventsPerWord;
  const int64_t across = scan.channels / F::W, job = thread_index() / across, d = thread_index() % across * F::W;
  if (job >= plan.jobs) return;
  const typename F::Cell cell(scan.epsilon, scan.surrogate_scale);
  const typename F::States alpha = load_alpha<F>(scan, d);

  Spans spans(scan, plan, job, 1);
  for (Span span; spans.next(span);) {
    typename F::States s =
        span.first ? enter<F>(scan, span, d, alpha) : load_states<F>(work.entry, job, scan.channels, d);
    const Row<typename F::T> h(scan, scan.h, span.row, d);
    Checkpoints<F> checkpoints(scan, span, d);
    checkpoints.pass(span.begin, s);
    for (int64_t position = span.begin / U * U; position < span.end; position += U) {
      const Valid valid(span.begin, span.end, position, U);
      const Vector<int32_t, F::W> words = load_events<F>(scan, span.row, position, d);
#pragma unroll
      for (int t = 0; t < U; ++t) {
        if (!valid(t)) continue;
#pragma unroll
        for (int w = 0; w < F::W; ++w) s.at[w] = cell.step_event(words.at[w] >> 2 * t & 3, s.at[w]);
        store_h<F>(h.at(position + t), alpha, s);
      }
      checkpoints.pass(position + U, s);
    }
    if (span.last) store_states<F>(scan.final_state, span.sequence, scan.channels, d, s);
  }
}

// ------------------------------------------------------------------------------------------------ between the jobs

template <class S>
__device__ __forceinline__ S apply(S a, S u, S s) {
  if (a == S(kForget)) return u;
  if (s != s) return s;
  return a == S(0) ? u : a * s + u;
}

// Chunked, between: the entry state of every job of a row, from the left; for the adjoint (direction -1) m from the
// right. A block takes kLanes channels of a row; each group of its threads composes a run of the jobs, then all groups
// before it give the run's entry. The order depends on sizes only.
template <class S>
__global__ void __launch_bounds__(kLanes* kGroups)
    carry(Workspace<S> work, int64_t jobs, int64_t segments, int64_t channels, int direction) {
  S* const run_factor = reinterpret_cast<S*>(shared_memory());  // [groups, kLanes]
  S* const run_offset = run_factor + blockDim.y * kLanes;
  const int64_t blocks = (channels + kLanes - 1) / kLanes, row = blockIdx.x / blocks;
  const int64_t d = blockIdx.x % blocks * kLanes + threadIdx.x;
  const int64_t run = (segments + blockDim.y - 1) / blockDim.y, begin = threadIdx.y * run;
  const int64_t end = d < channels ? (begin + run < segments ? begin + run : segments) : 0;
  const auto at = [&](int64_t i) {
    return (row * segments + (direction > 0 ? i : segments - 1 - i)) * channels + d;
  };
  const auto read = [&](const S* from, int64_t i) { return load<Traffic::kState, 1>(from + at(i)).at[0]; };

  S a = 1, u = 0;
#pragma unroll 4
  for (int64_t i = begin; i < end; ++i) {
    const S factor = read(work.factor, i);
    u = apply(factor, read(work.offset, i), u);
    a = factor == S(kForget) || a == S(kForget) ? S(kForget) : factor * a;
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
__global__ void __launch_bounds__(kForwardThreads)
    summarize_adjoint(const __grid_constant__ Scan scan, const __grid_constant__ Plan plan,
                      Workspace<typename F::S> work) {
  constexpr int U = kFromEvents ? kEventsPerWord : kForwardTile;
  const int64_t across = scan.channels / F::W, job = thread_index() / across, d = thread_index() % across * F::W;
  if (job >= plan.jobs) return;
  const typename F::Cell cell(scan.epsilon, scan.surrogate_scale);
  const ChannelInputs<F> channel(scan, d);
  const typename F::States alpha = load_alpha<F>(scan, d);

  typename F::States a = all<F>(1), m = all<F>(0);
  bool forget = false;
  Spans spans(scan, plan, job, -1);
  for (Span span; spans.next(span);) {
    if (span.last) m = load_states<F>(scan.grad_final, span.sequence, scan.channels, d), forget = true;
    const Row<const typename F::T> g(scan, scan.grad_h, span.row, d);
    for (int64_t position = (span.end - 1) / U * U; position + U > span.begin; position -= U) {
      const Valid valid(span.begin, span.end, position, U);
      Vector<typename F::T, F::W> grad[U];
#pragma unroll
      for (int t = 0; t < U; ++t)
        if (valid(t)) grad[t] = load<Traffic::kStream, F::W>(g.at(position + t));
      Tile<F, U> tile;
      Vector<int32_t, F::W> words;
      if constexpr (kFromEvents) words = load_events<F>(scan, span.row, position, d);
      else tile.load_streams(scan, span.row, d, position, valid);
#pragma unroll
      for (int t = U - 1; t >= 0; --t) {
        if (!valid(t)) continue;
#pragma unroll
        for (int w = 0; w < F::W; ++w) {
          const typename F::S lambda = alpha.at[w] * widen(grad[t].at[w]) + m.at[w];
          if constexpr (kFromEvents) {
            const int code = words.at[w] >> 2 * t & 3;
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
    }
  }
  store_states<F>(work.factor, job, scan.channels, d, forget ? all<F>(kForget) : a);
  store_states<F>(work.offset, job, scan.channels, d, m);
}

// What a thread of `backward` keeps of a chunk in shared memory, side by side with its neighbours': the states that
// enter its tiles and, unless they are read a second time, the streams.
template <class F, bool kFromEvents>
struct Kept {
  using Elements = Vector<typename F::T, F::W>;
  static constexpr int U = kBackwardTile;
  typename F::States* states;
  Elements* raw;

  static constexpr int64_t bytes(int64_t chunk, int64_t threads) {
    return threads * chunk * (sizeof(typename F::States) / U + (kFromEvents ? 0 : F::kStreams * sizeof(Elements)));
  }
  __device__ __forceinline__ explicit Kept(const Scan& scan)
      : states(reinterpret_cast<typename F::States*>(shared_memory()) + threadIdx.x),
        raw(reinterpret_cast<Elements*>(shared_memory() + scan.chunk / U * blockDim.x * sizeof(typename F::States)) +
            threadIdx.x) {}
  __device__ __forceinline__ typename F::States& state(int tile) const { return states[tile * blockDim.x]; }
  __device__ __forceinline__ void put(int tile, const Tile<F, U>& from, Valid valid) const {
#pragma unroll
    for (int t = 0; t < U; ++t)
      for_streams<F>([&](int, int k) {
        if (valid(t)) raw[((tile * U + t) * F::kStreams + k) * blockDim.x] = from.raw[t][k];
      });
  }
  __device__ __forceinline__ void get(int tile, Tile<F, U>& to, Valid valid) const {
#pragma unroll
    for (int t = 0; t < U; ++t)
      for_streams<F>([&](int, int k) {
        if (valid(t)) to.raw[t][k] = raw[((tile * U + t) * F::kStreams + k) * blockDim.x];
      });
  }
};

// Sums over time of a thread, per channel: of a chunk, added up chunk by chunk. [0] is alpha's gradient, [1 + i] that
// of input i.
template <class F>
struct Sums {
  typename F::States at[1 + F::kInputs];

  static constexpr __device__ bool wanted(int i) { return i == 0 || F::per_channel(i - 1); }
  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int i = 0; i <= F::kInputs; ++i) at[i] = all<F>(0);
  }
  __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
    for (int i = 0; i <= F::kInputs; ++i)
#pragma unroll
      for (int w = 0; w < F::W; ++w)
        if (wanted(i)) at[i].at[w] += other.at[i].at[w];
  }
  __device__ __forceinline__ void write(typename F::S* rows, const Plan& plan, int64_t row, int64_t channels,
                                        int64_t d) const {
    int k = 0;
#pragma unroll
    for (int i = 0; i <= F::kInputs; ++i)
      if (wanted(i)) store_states<F>(rows, row * plan.sums + k++, channels, d, at[i]);
  }
};

constexpr int backward_threads(bool from_events) { return from_events ? 64 : 32; }

// Gradients, chunk by chunk from the right: first the states from the chunk's saved boundary state, then m.
// Wide: whole sequences, from the streams. Chunked: from the jobs' entry m, the states from the events if they are.
template <class F, bool kFromEvents>
__global__ void __launch_bounds__(backward_threads(kFromEvents))
    backward(const __grid_constant__ Scan scan, const __grid_constant__ Plan plan, Workspace<typename F::S> work) {
  using S = typename F::S;
  constexpr int U = kBackwardTile;
  const int64_t across = scan.channels / F::W, row = thread_index() / across, d = thread_index() % across * F::W;
  if (row >= plan.sum_rows) return;
  const typename F::Cell cell(scan.epsilon, scan.surrogate_scale);
  const ChannelInputs<F> channel(scan, d);
  const typename F::States alpha = load_alpha<F>(scan, d);
  const Kept<F, kFromEvents> kept(scan);
  Sums<F> total;

  const auto step = [&](const Tile<F, U>& tile, int t, typename F::States& s) {
#pragma unroll
    for (int w = 0; w < F::W; ++w) {
      S x[F::kInputs];
      tile.inputs(t, w, channel, x);
      s.at[w] = cell.step(x, s.at[w]);
    }
  };

  for (int64_t job = row; job < plan.jobs; job += plan.sum_rows) {
    typename F::States m;
    Spans spans(scan, plan, job, -1);
    for (Span span; spans.next(span);) {
      m = span.last ? load_states<F>(scan.grad_final, span.sequence, scan.channels, d)
                    : load_states<F>(work.entry, job, scan.channels, d);
      const Row<const typename F::T> g(scan, scan.grad_h, span.row, d);
      for (int64_t chunk = (span.end - 1) / scan.chunk * scan.chunk; chunk + scan.chunk > span.begin && chunk >= 0;
           chunk -= scan.chunk) {
        const int64_t begin = chunk > span.begin ? chunk : span.begin;
        const int64_t end = chunk + scan.chunk < span.end ? chunk + scan.chunk : span.end;
        typename F::States s = span.first && begin == span.begin
                                   ? initial_state<F>(scan, span.sequence, d)
                                   : load_states<F>(scan.checkpoints, checkpoint_row(scan, span, chunk),
                                                    scan.channels, d);
        if constexpr (kFromEvents) {
          for (int64_t word = begin / kEventsPerWord * kEventsPerWord; word < end; word += kEventsPerWord) {
            const Vector<int32_t, F::W> words = load_events<F>(scan, span.row, word, d);
            const Valid valid(begin, end, word, kEventsPerWord);
#pragma unroll
            for (int t = 0; t < kEventsPerWord; ++t) {
              if (t % U == 0) kept.state(int(word - chunk + t) / U) = s;
              if (!valid(t)) continue;
#pragma unroll
              for (int w = 0; w < F::W; ++w) s.at[w] = cell.step_event(words.at[w] >> 2 * t & 3, s.at[w]);
            }
          }
        } else {
          for (int64_t position = begin / U * U; position < end; position += U) {
            const Valid valid(begin, end, position, U);
            const int at = int(position - chunk) / U;
            Tile<F, U> tile;
            tile.load_streams(scan, span.row, d, position, valid);
            kept.put(at, tile, valid);
            kept.state(at) = s;
#pragma unroll
            for (int t = 0; t < U; ++t)
              if (valid(t)) step(tile, t, s);
          }
        }

        Sums<F> sums;
        for (int64_t position = (end - 1) / U * U; position + U > begin; position -= U) {
          const Valid valid(begin, end, position, U);
          const int at = int(position - chunk) / U;
          Vector<typename F::T, F::W> grad[U];
#pragma unroll
          for (int t = 0; t < U; ++t)
            if (valid(t)) grad[t] = load<Traffic::kStream, F::W>(g.at(position + t));
          Tile<F, U> tile;
          if constexpr (kFromEvents) tile.load_streams(scan, span.row, d, position, valid);
          else kept.get(at, tile, valid);

          typename F::States states[U + 1];  // before each step, and after the last
          states[0] = kept.state(at);
#pragma unroll
          for (int t = 0; t < U; ++t) {
            states[t + 1] = states[t];
            if (valid(t)) step(tile, t, states[t + 1]);
          }
#pragma unroll
          for (int t = U - 1; t >= 0; --t) {
            if (!valid(t)) continue;
            typename F::States gradients[F::kInputs];
#pragma unroll
            for (int w = 0; w < F::W; ++w) {
              S x[F::kInputs], dx[F::kInputs];
              tile.inputs(t, w, channel, x);
              const S grad_h = widen(grad[t].at[w]);
              m.at[w] = cell.vjp(x, states[t].at[w], alpha.at[w] * grad_h + m.at[w], dx);
              sums.at[0].at[w] += grad_h * states[t + 1].at[w];
#pragma unroll
              for (int i = 0; i < F::kInputs; ++i) {
                if (F::per_channel(i)) sums.at[1 + i].at[w] += dx[i];
                else gradients[i].at[w] = dx[i];
              }
            }
            for_streams<F>([&](int i, int) {
              const Row<typename F::T> into(scan, scan.grad_in[i], span.row, d);
              store<Traffic::kStream>(into.at(position + t), narrow<typename F::T>(gradients[i]));
            });
          }
        }
        total.add(sums);
      }
      if (span.first) store_states<F>(scan.grad_initial, span.sequence, scan.channels, d, m);
    }
  }
  if (plan.sums > 0) total.write(work.sums, plan, row, scan.channels, d);
}

}  // namespace mru::cuda
