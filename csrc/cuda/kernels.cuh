// The CUDA kernels: a scan over a cell (csrc/cells), threads along the channels. In this file what all of them are made
// of, and those that a time that is cut into jobs needs more, with all of a job's time inside a thread; tiles.cuh has
// `forward` and `backward`.
//
//   B batch, T time, D channels     W channels of a thread, side by side: 16 bytes of a stream, or 1
//   row        of a batch; a packed call has one          position  of the scan in a row: 0 is the first step scanned
//   sequence   n; begins and ends inside a row            job       the positions that a thread scans (plan.h)
//   span       a job's part of one sequence               tile      U steps, aligned: their loads are issued together
//                                                                   (single steps at the ends of a span)
//   s, m       state; a lambda of the step to the right   a, u      a job as one map: s -> a s + u; m -> a m + u
//
// A NaN state stays NaN; nothing is multiplied by a factor 0.
#pragma once
#include "../cells/cut.h"
#include "pairs.cuh"
#include "plan.h"

namespace mru::cuda {

constexpr int kJobThreads = 128, kJobBlocks = 3;  // a thread a job; blocks that a multiprocessor has registers for
template <class F>
constexpr int kJobTile = F::W == 8 ? 4 : 8;
constexpr int kCarryLanes = 4, kCarryGroups = 128;  // threads of `carry`: channels, runs of jobs at once
template <class S>
constexpr int kCarryRun = 64 / sizeof(S);  // jobs of a run, at most
constexpr int kCarryPart = 8;              // runs that are walked over side by side with other parts
constexpr int kLanes = 32, kGroups = 32;   // of `reduce`: channels, rows at once
constexpr int kCheckThreads = 256;

// The factor of a job in which a sequence begins (for the adjoint: ends): what came before is forgotten, NaN included.
// It is NaN; where a NaN in the inputs makes a factor NaN, the offset is NaN as well, and nothing is lost.
template <class S>
__device__ __forceinline__ S forgets() {
  return quiet_nan<S>();
}

// What a kernel is compiled for. Bit i of kChannels_: input i is one value per channel instead of a stream.
template <class Cell_, class T_, int W_, unsigned kChannels_>
struct Form {
  using Cell = Cell_;
  using T = T_;
  using S = typename StateOf<T_>::type;
  using States = Vector<S, W_>;
  template <int kWidth>
  using With = Form<Cell_, T_, kWidth, kChannels_>;  // so many channels of a thread
  using Single = With<1>;
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
  S* factor;                       // [jobs, D]
  S* offset;                       // [jobs, D]
  typename RealOf<S>::type* late;  // [jobs, D]: recent magnitude of `offset` (cut.h); unused if `forgets`
  S* entry;                        // [jobs, D]: s or m where the job begins (for the adjoint: at its right)
  S* exit;                         // [jobs, D]: s or m where the job ends; null where nothing is checked
  int* again;                      // whether the wide form is to scan the call again; null where nothing is checked
  S* sums;                         // [sum_rows, sums, D]
  bool forgets;                    // whether epsilon is 0 and a write forgets the state
};

// What every kernel over channels is given.
template <class S>
struct Call {
  Scan scan;
  Plan plan;
  Workspace<S> work;
  Divisor across;  // D / W: the threads of a job
  Surrogate<typename RealOf<S>::type> surrogate;
  const int* unless_zero = nullptr;  // not null: the kernel returns at once if *unless_zero is 0
};

template <class S>
__device__ __forceinline__ bool is_idle(const Call<S>& call) {
  return call.unless_zero && load<Traffic::kState, 1>(call.unless_zero).at[0] == 0;
}

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
// The same until one returns false, which it then does too.
template <int U, class Each>
__device__ __forceinline__ bool for_tiles_while(int64_t begin, int64_t end, Each each) {
  for (int64_t position = begin; position < end;) {
    const bool is_tile = position % U == 0 && position + U <= end;
    if (!(is_tile ? each.template operator()<U>(position) : each.template operator()<1>(position))) return false;
    position += is_tile ? U : 1;
  }
  return true;
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
  // The inputs of step t at channel w of the thread; or at its w-th pair of channels, where all are streams.
  __device__ __forceinline__ void inputs(int t, int w, const ChannelInputs<F>& channel, typename F::S* x) const {
    int k = 0;
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i) x[i] = F::per_channel(i) ? channel.value[i].at[w] : widen(raw[t][k++], w);
  }
  __device__ __forceinline__ void inputs(int t, int w, const ChannelInputs<F>&, Pair<typename F::T>* x) const {
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i) x[i] = bits_as<Vector<Pair<typename F::T>, F::W / 2>>(raw[t][i]).at[w];
  }
};

// The tiles of a span, from the left: each is copied to shared memory while the one before it is worked on. A thread reads
// only what it copied itself.
template <class F, int U>
class TilesAhead {
 public:
  static constexpr int64_t bytes(int threads) { return int64_t(2 * kStep) * threads * sizeof(Elements); }

  __device__ __forceinline__ TilesAhead(const Scan& scan, int64_t d)
      : scan_(scan), d_(d), slots_(reinterpret_cast<Elements*>(shared_memory()) + threadIdx.x) {}
  __device__ __forceinline__ Tile<F, U> at(const Span& span, int64_t position) {
    if (position != ahead_) copy(span, position);
    const Elements* const slot = slots_ + slot_ * blockDim.x;
    slot_ ^= kStep;
    ahead_ = -1;
    if (position + 2 * U <= span.end) copy(span, ahead_ = position + U);
    else commit_copies();
    wait_for_copies<1>();
    Tile<F, U> tile;
#pragma unroll
    for (int i = 0; i < kStep; ++i) tile.raw[i / F::kStreams][i % F::kStreams] = read_again(slot[i * blockDim.x]);
    return tile;
  }

 private:
  using Elements = Vector<typename F::T, F::W>;
  static constexpr int kStep = U * F::kStreams;  // from one of the two slots to the other

  __device__ __forceinline__ void copy(const Span& span, int64_t position) {
    for_streams<F>([&](int i, int k) {
      const Row<const typename F::T> stream(scan_, scan_.in[i].stream, span.row, d_);
      const typename F::T* at = stream.at(position);
#pragma unroll
      for (int t = 0; t < U; ++t, at = advance(at, stream.step))
        copy_ahead<Traffic::kPassing, F::W>(slots_ + (slot_ + t * F::kStreams + k) * blockDim.x, at);
    });
    commit_copies();
  }

  const Scan& scan_;
  const int64_t d_;
  Elements* const slots_;
  int slot_ = 0;
  int64_t ahead_ = -1;  // the position of the tile that is on its way
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
using Lates = Vector<typename RealOf<typename F::S>::type, F::W>;
template <class F>
__device__ __forceinline__ typename F::States all(typename F::S value) {
  typename F::States s;
#pragma unroll
  for (int w = 0; w < F::W; ++w) s.at[w] = value;
  return s;
}

template <class F>
__device__ __forceinline__ typename F::States conj_all(typename F::States s) {
#pragma unroll
  for (int w = 0; w < F::W; ++w) s.at[w] = conj(s.at[w]);
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

// The codes of a job as a thread comes past them, from the left or (direction -1) from the right: a word is loaded while
// the one before it is worked on.
template <class F>
class Events {
 public:
  __device__ __forceinline__ Events(const Scan& scan, const Plan& plan, int64_t job, int64_t d, int direction)
      : scan_(scan), d_(d), row_(plan.segments_divisor(job)), ahead_by_(direction * kEventsPerWord) {
    begin_ = (job - row_ * plan.segments) * scan.segment;
    end_ = begin_ + scan.segment < scan.time ? begin_ + scan.segment : scan.time;
  }
  // The codes from a position on: that of the first step is not shifted.
  __device__ __forceinline__ Vector<int32_t, F::W> at(int64_t position) {
    const int64_t first = position / kEventsPerWord * kEventsPerWord;
    if (first != first_) {
      words_ = first == first_ + ahead_by_ ? ahead_ : load_from(first);
      first_ = first;
      const int64_t next = first + ahead_by_;
      if (begin_ <= next && next < end_) ahead_ = load_from(next);
    }
    Vector<int32_t, F::W> codes;
#pragma unroll
    for (int w = 0; w < F::W; ++w) codes.at[w] = words_.at[w] >> int(position - first);
    return codes;
  }

 private:
  __device__ __forceinline__ Vector<int32_t, F::W> load_from(int64_t position) const {
    return load<Traffic::kEvents, F::W>(static_cast<const int32_t*>(event_row<F>(scan_, row_, position, d_)));
  }

  const Scan& scan_;
  const int64_t d_, row_;
  const int ahead_by_;
  int64_t begin_, end_, first_ = -1;
  Vector<int32_t, F::W> words_, ahead_;
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

template <class F, Traffic kind = Traffic::kStream>
__device__ __forceinline__ void store_h(typename F::T* at, const typename F::States& alpha,
                                        const typename F::States& s) {
  typename F::States h;
#pragma unroll
  for (int w = 0; w < F::W; ++w) h.at[w] = real(alpha.at[w]) * s.at[w];
  store<kind>(at, narrow<typename F::T>(h));
}

// a b + c; a may be real where the others are complex.
template <class A, class S>
__device__ __forceinline__ S product_sum(A a, S b, S c) {
  if constexpr (RealOf<S>::is_complex) return a * b + c;
  else return multiply_add(a, b, c);
}

// Where a write forgets, a state is what was written last, or what entered: nothing is computed. Values V hold one channel,
// or two of streams in half precision; where a cell is to decide by them, all of its inputs must be such streams.
template <class F, bool kDecides = true>
struct Writes {
  using Cell = typename F::Cell;
  using S = typename F::S;
  using T = typename F::T;
  static constexpr bool kPairs =
      Cell::kEvents && sizeof(T) == 2 && F::W % 2 == 0 && (F::kStreams == F::kInputs || !kDecides);
  using V = typename std::conditional_t<kPairs, std::type_identity<Pair<T>>, std::type_identity<S>>::type;
  using Mask = std::conditional_t<kPairs, PairMask, bool>;
  static constexpr int kEach = kElements<V>;
  using Values = Vector<V, F::W / kEach>;

  static __device__ __forceinline__ Values all_of(S value) {
    Values x;
#pragma unroll
    for (int i = 0; i < F::W / kEach; ++i) x.at[i] = splat<V>(value);
    return x;
  }
  static __device__ __forceinline__ Values none() { return all_of(quiet_nan<S>()); }
  // At channel w of the thread.
  static __device__ __forceinline__ S at(const Values& x, int w) { return lane(x.at[w / kEach], w % kEach); }
  static __device__ __forceinline__ bool has_nan(const Values& x) {
    bool found = false;
#pragma unroll
    for (int w = 0; w < F::W; ++w) found |= is_nan(at(x, w));
    return found;
  }
  static __device__ __forceinline__ Values values(const Vector<T, F::W>& elements) {
    if constexpr (kPairs) return bits_as<Values>(elements);
    else return widen_all(elements);
  }

  // What was written last, after a step with inputs x.
  static __device__ __forceinline__ V last(const Cell& cell, const V* x, V before) {
    if constexpr (Cell::kEvents)
      return select(cell.writes(x), cell.value(x, splat<V>(Cell::kFirstValue), splat<V>(Cell::kSecondValue)), before);
    else return cell.redo(x, before);
  }
  // Steps as a map of the state, of which nothing was written where `last` is NaN.
  static __device__ __forceinline__ void as_map(const Values& last, typename F::States& a, typename F::States& u) {
#pragma unroll
    for (int w = 0; w < F::W; ++w) {
      const S s = at(last, w);
      a.at[w] = is_nan(s) ? 1 : 0, u.at[w] = is_nan(s) ? 0 : s;
    }
  }

  // alpha s, as it is stored.
  static __device__ __forceinline__ Values h(const typename F::States& alpha, const typename F::States& s) {
    typename F::States h;
#pragma unroll
    for (int w = 0; w < F::W; ++w) h.at[w] = alpha.at[w] * s.at[w];
    if constexpr (kPairs) return bits_as<Values>(narrow<T>(h));
    else return h;
  }
  static __device__ __forceinline__ Values first(const typename F::States& alpha) {
    return h(alpha, all<F>(Cell::kFirstValue));
  }
  static __device__ __forceinline__ Values second(const typename F::States& alpha) {
    return h(alpha, all<F>(Cell::kSecondValue));
  }
  template <Traffic kind = Traffic::kStream>
  static __device__ __forceinline__ void store_h(T* at, const Values& h) {
    if constexpr (kPairs) store<kind>(at, bits_as<Vector<T, F::W>>(h));
    else store<kind>(at, narrow<T>(h));
  }

  // Event codes of the thread's channels (csrc/cells/write_or_hold.h), as planes of masks; those of a pair lie side by side.
  struct Codes {
    uint32_t writes[F::W / kEach] = {}, second[F::W / kEach] = {};

    Codes() = default;
    __device__ __forceinline__ explicit Codes(const Vector<int32_t, F::W>& words) {
#pragma unroll
      for (int i = 0; i < F::W / kEach; ++i) {
        if constexpr (kPairs) {
          const uint32_t low = words.at[2 * i], high = words.at[2 * i + 1];
          writes[i] = (low & 0xffff) | high << 16, second[i] = low >> 16 | (high & 0xffff0000);
        } else {
          writes[i] = words.at[i], second[i] = uint32_t(words.at[i]) >> 16;
        }
      }
    }
    static __device__ __forceinline__ Mask mask(uint32_t plane, int t) {
      if constexpr (kPairs) return {plane << (15 - t)};
      else return plane >> t & 1;
    }
    // Of pairs: step t of the i-th, and the words of all.
    __device__ __forceinline__ void add(int i, int t, PairMask wrote, PairMask is_second) {
      writes[i] |= wrote.bits >> (15 - t) & 0x00010001u << t;
      second[i] |= is_second.bits >> (15 - t) & 0x00010001u << t;
    }
    __device__ __forceinline__ Vector<int32_t, F::W> words() const {
      Vector<int32_t, F::W> words;
#pragma unroll
      for (int i = 0; i < F::W / 2; ++i) {
        const uint32_t seconds = second[i] & writes[i];
        words.at[2 * i] = (writes[i] & 0xffff) | seconds << 16;
        words.at[2 * i + 1] = writes[i] >> 16 | (seconds & 0xffff0000);
      }
      return words;
    }
  };
};

// Calls each(cell); where a write forgets the state that is known to the compiler.
template <class Cell, class S, class Each>
__device__ __forceinline__ void with_cell(const Call<S>& call, Each each) {
  if constexpr (Cell::kForgets)
    if (call.scan.epsilon == 0) return each.template operator()<true>(Cell(0, call.surrogate));
  each.template operator()<false>(Cell(call.scan.epsilon, call.surrogate));
}

// ------------------------------------------------------------------------------------------------ forward

// The one code that does what all of a word do where a write forgets the state: NaN, else the last that writes.
__device__ __forceinline__ int last_of(int word) {
  const int writes = word & kWrites, nan = word >> 16 & kWrites & ~writes;
  const int last = writes == 0 ? kHold : word >> (31 - __clz(writes)) & kEventMask;
  return nan != 0 ? kNan : last;
}

// Steps whose writes forget, in pairs of channels: their codes, and the map with them. False, and nothing, if one is NaN.
template <class F, int U>
__device__ __forceinline__ bool summarize_pairs(const Tile<F, U>& tile, const ChannelInputs<F>& channel,
                                                const typename F::Cell& cell, Vector<int32_t, F::W>& words,
                                                typename F::States& a, typename F::States& u) {
  using W = Writes<F>;
  auto last = W::none(), squared = W::all_of(0);
  typename W::Codes codes;
#pragma unroll
  for (int t = 0; t < U; ++t)
#pragma unroll
    for (int i = 0; i < F::W / 2; ++i) {
      typename W::V x[F::kInputs];
      tile.inputs(t, i, channel, x);
      last.at[i] = W::last(cell, x, last.at[i]);
      codes.add(i, t, cell.writes(x), {cell.value(x, typename W::V{0}, typename W::V{kSigns}).bits});
#pragma unroll
      for (int k = 0; k < F::kInputs; ++k) squared.at[i] = squares(x[k], squared.at[i]);
    }
  if (W::has_nan(squared)) return false;
  words = codes.words();
#pragma unroll
  for (int w = 0; w < F::W; ++w) {
    const typename F::S s = W::at(last, w);
    u.at[w] = is_nan(s) || is_nan(u.at[w]) ? u.at[w] : s;
    a.at[w] = is_nan(s) ? a.at[w] : 0;
  }
  return true;
}

// Stores a job's map (a, u) and the recent magnitude of u. `forget`: the job ignores the state on entry.
template <class F>
__device__ __forceinline__ void store_map(const Call<typename F::S>& call, int64_t job, int64_t d, bool forget,
                                          const typename F::States& a, const typename F::States& u,
                                          const Lates<F>& late) {
  const auto& work = call.work;
  const int64_t channels = call.scan.channels;
  store_states<F>(work.factor, job, channels, d, forget ? all<F>(forgets<typename F::S>()) : a);
  store_states<F>(work.offset, job, channels, d, u);
  if (!work.forgets) store<Traffic::kState>(work.late + job * channels + d, late);
}

// Chunked, first: each job as one map of the state, and its events.
template <class F>
__global__ void __launch_bounds__(kJobThreads, kJobBlocks) summarize(const __grid_constant__ Call<typename F::S> call) {
  const auto& [scan, plan, work, across, surrogate, unless_zero] = call;
  const auto [job, d] = place<F>(call);
  if (job >= plan.jobs) return;
  const ChannelInputs<F> channel(scan, d);
  const typename F::States alpha = load_alpha<F>(scan, d);

  typename F::States a = all<F>(1), u = all<F>(0);
  Lates<F> late = {};
  bool forget = false;
  Vector<int32_t, F::W> words = {};
  int64_t word = -1;  // position of the words' first step; a word may hold steps of several spans
  TilesAhead<F, kJobTile<F>> tiles(scan, d);
  with_cell<typename F::Cell>(call, [&]<bool kForgets>(const typename F::Cell& cell) {
    Spans spans(scan, plan, job, 1);
    for (Span span; spans.next(span);) {
      if (span.first) u = enter<F>(scan, span, d, alpha), forget = true;
      for_tiles<kJobTile<F>>(span.begin, span.end, [&]<int U>(int64_t position) {
        Tile<F, U> tile;
        if constexpr (U > 1) tile = tiles.at(span, position);
        else tile = {scan, span.row, d, position};
        [[maybe_unused]] const int before = position % kEventsPerWord;
        if constexpr (F::Cell::kEvents) {
          if (position - before != word) {
            if (word >= 0) store_events<F>(scan, span.row, word, d, words);
            word = position - before;
            words = {};
          }
        }
        if constexpr (kForgets && Writes<F>::kPairs && U > 1) {
          Vector<int32_t, F::W> codes;
          if (summarize_pairs<F>(tile, channel, cell, codes, a, u)) {
#pragma unroll
            for (int w = 0; w < F::W; ++w) words.at[w] |= codes.at[w] << before;
            return;
          }
        }
#pragma unroll
        for (int w = 0; w < F::W; ++w) {
          [[maybe_unused]] int32_t codes = 0;
#pragma unroll
          for (int t = 0; t < U; ++t) {
            typename F::S x[F::kInputs];
            tile.inputs(t, w, channel, x);
            if constexpr (F::Cell::kEvents) codes |= cell.encode(x) << t;
            if constexpr (F::Cell::kEvents && kForgets) continue;
            u.at[w] = cell.step(x, u.at[w]);
            a.at[w] = conj(cell.pull(x, conj(a.at[w])));
            if constexpr (!kForgets) late.at[w] = recent(u.at[w], late.at[w]);
          }
          if constexpr (F::Cell::kEvents) {
            words.at[w] |= codes << before;
            if constexpr (kForgets) {
              const int last = last_of(codes);
              u.at[w] = cell.step_event(last, u.at[w]);
              a.at[w] = cell.pull_event(last, a.at[w]);
            }
          }
        }
      });
    }
  });
  if constexpr (F::Cell::kEvents)
    if (word >= 0) store_events<F>(scan, plan.segments_divisor(job), word, d, words);
  store_map<F>(call, job, d, forget, a, u, late);
}

// Chunked, last: h, final states and checkpoints from the events and the jobs' entry states.
template <class F>
__global__ void __launch_bounds__(kJobThreads, kJobBlocks) expand(const __grid_constant__ Call<typename F::S> call) {
  using S = typename F::S;
  const auto& [scan, plan, work, across, surrogate, unless_zero] = call;
  const auto [job, d] = place<F>(call);
  if (job >= plan.jobs) return;
  const typename F::Cell cell(scan.epsilon);
  const typename F::States alpha = load_alpha<F>(scan, d);

  Events<F> events(scan, plan, job, d, 1);
  Spans spans(scan, plan, job, 1);
  typename F::States s = all<F>(0);
  for (Span span; spans.next(span);) {
    s = span.first ? enter<F>(scan, span, d, alpha) : load_states<F>(work.entry, job, scan.channels, d);
    const Row<typename F::T> h(scan, scan.h, span.row, d);
    Checkpoints<F> checkpoints(scan, plan, span, d);
    checkpoints.pass(span.begin, s);
    for_tiles<kEventsPerWord>(span.begin, span.end, [&]<int U>(int64_t position) {
      const Vector<int32_t, F::W> codes = events.at(position);
      bool copies = scan.epsilon == 0;  // h is one of two values, or what entered
#pragma unroll
      for (int w = 0; w < F::W; ++w)
        copies = copies && (codes.at[w] >> 16 & ~codes.at[w] & ((1 << U) - 1)) == 0 && !is_nan(s.at[w]);
      typename F::T* out = h.at(position);
      if (copies) {
        using W = Writes<F, false>;
        const typename W::Codes planes(codes);
        const auto first = W::first(alpha), second = W::second(alpha);
        auto held = W::h(alpha, s);
#pragma unroll
        for (int t = 0; t < U; ++t, out = advance(out, h.step)) {
#pragma unroll
          for (int i = 0; i < F::W / W::kEach; ++i) {
            const auto value = select(W::Codes::mask(planes.second[i], t), second.at[i], first.at[i]);
            held.at[i] = select(W::Codes::mask(planes.writes[i], t), value, held.at[i]);
          }
          W::template store_h<Traffic::kPassing>(out, held);
        }
#pragma unroll
        for (int w = 0; w < F::W; ++w)
          s.at[w] = cell.step_event(last_of(codes.at[w] & int(((1u << U) - 1) * kEventMask)), s.at[w]);
      } else {
#pragma unroll 4
        for (int t = 0; t < U; ++t, out = advance(out, h.step)) {
#pragma unroll
          for (int w = 0; w < F::W; ++w) s.at[w] = cell.step_event(codes.at[w] >> t & kEventMask, s.at[w]);
          store_h<F, Traffic::kPassing>(out, alpha, s);
        }
      }
      checkpoints.pass(position + U, s);
    });
    if (span.last) store_states<F>(scan.final_state, span.sequence, scan.channels, d, s);
  }
  if (work.exit) store_states<F>(work.exit, job, scan.channels, d, s);
}

// ------------------------------------------------------------------------------------------------ between the jobs

template <class S>
__device__ __forceinline__ S apply(S a, S u, S s) {
  const bool alone = (a == S(0) && s == s) || a != a;  // nothing of s is left; or a forgets
  const S both = a * s + u;
  return alone ? u : both;
}

// From one map to the next, `stride` apart: each value, the offset of the map, becomes what enters it. Returns what leaves
// the last.
template <class S, class Apply>
__device__ __forceinline__ S walk(const S* factors, S* values, int stride, int count, S carried, Apply apply) {
  constexpr int kAhead = sizeof(S) > 8 ? 2 : 4;
  for (int i = 0; i < count; i += kAhead) {
    S factor[kAhead], offset[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j < count) factor[j] = factors[(i + j) * stride], offset[j] = values[(i + j) * stride];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j < count) {
        values[(i + j) * stride] = carried;
        carried = apply(factor[j], offset[j], carried);
      }
  }
  return carried;
}

// Chunked, between: the entry state of every job of a row, from the left; for the adjoint (direction -1) m from the
// right. A block takes kCarryLanes channels of a row and goes through its jobs in turns: each group of its threads composes
// a run of jobs, some groups each a part of the runs, and walks over the parts and then over the runs of each give what
// enters a run. The order depends on sizes only.
template <class S>
__global__ void __launch_bounds__(kCarryLanes* kCarryGroups, 1)
    carry(Workspace<S> work, int64_t segments, int run, int64_t channels, int direction) {
  const int group = int(threadIdx.y), groups = int(blockDim.y), parts = (groups + kCarryPart - 1) / kCarryPart;
  S* const factors = reinterpret_cast<S*>(shared_memory()) + threadIdx.x;  // [groups, kCarryLanes], of runs
  S* const offsets = factors + groups * kCarryLanes;
  S* const part_factors = offsets + groups * kCarryLanes;  // [parts, kCarryLanes]
  S* const part_offsets = part_factors + parts * kCarryLanes;
  const unsigned blocks = unsigned((channels + kCarryLanes - 1) / kCarryLanes);
  const int64_t row = blockIdx.x / blocks, d = int64_t(blockIdx.x % blocks) * kCarryLanes + threadIdx.x;
  const int own = group * kCarryLanes;
  const int first = own * kCarryPart, after = groups - group * kCarryPart;
  const int of_part = after < kCarryPart ? after : kCarryPart;  // if the group has a part
  const int64_t step = direction * channels;
  if (work.again && blockIdx.x == 0 && threadIdx.x == 0 && group == 0)
    store<Traffic::kState>(work.again, Vector<int, 1>{{0}});
  S left = 0;  // of the first group's threads: what the jobs before a turn leave
  for (int64_t turn = 0; turn < segments; turn += int64_t(groups) * run) {
    const int64_t begin = turn + int64_t(group) * run;
    const int64_t more = d < channels ? segments - begin : 0;
    const int count = int(more < run ? (more > 0 ? more : 0) : run);
    const int64_t at = (row * segments + (direction > 0 ? begin : segments - 1 - begin)) * channels + d;
    const S *next_factor = work.factor + at, *next_offset = work.offset + at;
    S factor[kCarryRun<S>], offset[kCarryRun<S>];
#pragma unroll
    for (int j = 0; j < kCarryRun<S>; ++j) {
      if (j < count) {
        factor[j] = load<Traffic::kState, 1>(next_factor).at[0];
        offset[j] = load<Traffic::kState, 1>(next_offset).at[0];
      }
      next_factor = advance(next_factor, step), next_offset = advance(next_offset, step);
    }
    S a = 1, u = 0;
#pragma unroll
    for (int j = 0; j < kCarryRun<S>; ++j)
      if (j < count) u = apply(factor[j], offset[j], u), a = factor[j] * a;
    factors[own] = a;
    offsets[own] = u;
    __syncthreads();
    if (group < parts) {
      a = 1, u = 0;
      for (int i = 0; i < of_part; ++i) {
        const int at = first + i * kCarryLanes;
        u = apply(factors[at], offsets[at], u), a = factors[at] * a;
      }
      part_factors[own] = a;
      part_offsets[own] = u;
    }
    __syncthreads();
    if (group == 0) left = walk(part_factors, part_offsets, kCarryLanes, parts, left, apply<S>);
    __syncthreads();
    if (group < parts) walk(factors + first, offsets + first, kCarryLanes, of_part, part_offsets[own], apply<S>);
    __syncthreads();
    S s = offsets[own];
    S* entry = work.entry + at;
#pragma unroll
    for (int j = 0; j < kCarryRun<S>; ++j, entry = advance(entry, step))
      if (j < count) {
        store<Traffic::kState>(entry, Vector<S, 1>{{s}});
        s = apply(factor[j], offset[j], s);
      }
  }
}

// Chunked, last: whether every job left what was handed to the next one. One thread per job and channel.
template <class S>
__global__ void __launch_bounds__(kCheckThreads) check(const __grid_constant__ Call<S> call, int direction) {
  const auto& [scan, plan, work, across, surrogate, unless_zero] = call;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, job = across(thread);
  if (job >= plan.jobs) return;
  const int64_t segment = job - plan.segments_divisor(job) * plan.segments, next = segment + direction;
  if (next < 0 || next >= plan.segments) return;
  const auto at = [&](const S* states, int64_t i) { return load<Traffic::kState, 1>(states + i).at[0]; };
  const S factor = at(work.factor, thread);
  const bool head = is_nan(factor);  // the offset is a state that was scanned
  const auto late = work.forgets ? 0 : load<Traffic::kState, 1>(work.late + thread).at[0];
  if (!consistent(factor, at(work.offset, thread), late, at(work.entry, thread), at(work.exit, thread),
                  at(work.entry, thread + direction * scan.channels), work.forgets || head))
    store<Traffic::kState>(work.again, Vector<int, 1>{{1}});
}

// total[d] = the sum over rows of sums[row, which, d], always in the same order. The number of rows differs if the wide form
// has scanned again.
template <class S>
__global__ void __launch_bounds__(kLanes* kGroups)
    reduce(Workspace<S> work, int64_t rows, int64_t whole_rows, int count, int which, int64_t channels, S* total) {
  const S* const sums = work.sums;
  if (work.again && load<Traffic::kState, 1>(work.again).at[0] != 0) rows = whole_rows;
  S* const partial = reinterpret_cast<S*>(shared_memory());  // [kGroups, kLanes]
  const int64_t d = int64_t(blockIdx.x) * kLanes + threadIdx.x;
  Sum<S> sum;
  if (d < channels)
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kGroups)
      sum.add(load<Traffic::kState, 1>(sums + (row * count + which) * channels + d).at[0]);
  partial[threadIdx.y * kLanes + threadIdx.x] = sum.total();
  __syncthreads();
  if (threadIdx.y != 0 || d >= channels) return;
  for (int g = 1; g < kGroups; ++g) sum.add(partial[g * kLanes + threadIdx.x]);
  store<Traffic::kState>(total + d, Vector<S, 1>{{sum.total()}});
}

// ------------------------------------------------------------------------------------------------ backward

// Maps of steps side by side as one, where a write forgets: of those on the left, and of others to their right. Whether a
// channel holds.
template <class F>
__device__ __forceinline__ bool append(const typename F::States& right_a, const typename F::States& right_m,
                                       typename F::States& a, typename F::States& m) {
  bool holds = false;
#pragma unroll
  for (int w = 0; w < F::W; ++w) {
    const bool held = a.at[w] != 0;
    m.at[w] = held ? m.at[w] + right_m.at[w] : m.at[w];
    a.at[w] = held ? right_a.at[w] : a.at[w];
    holds |= a.at[w] != 0;
  }
  return holds;
}

// Chunked, first: each job as one map of m, from the right; where a write forgets, from the left as far as to it. From the
// events, or from the streams again.
template <class F, bool kFromEvents>
__global__ void __launch_bounds__(kJobThreads, kJobBlocks)
    summarize_adjoint(const __grid_constant__ Call<typename F::S> call) {
  const auto& [scan, plan, work, across, surrogate, unless_zero] = call;
  const auto [job, d] = place<F>(call);
  if (job >= plan.jobs) return;
  const ChannelInputs<F> channel(scan, d);
  const typename F::States alpha = load_alpha<F>(scan, d);

  using States = typename F::States;
  constexpr int kTile = kFromEvents ? 8 : kJobTile<F>;
  States a = all<F>(1), m = all<F>(0);
  Lates<F> late = {};
  bool forget = false;
  with_cell<typename F::Cell>(call, [&]<bool kForgets>(const typename F::Cell& cell) {
    constexpr int kDirection = kForgets ? 1 : -1;
    Events<F> events(scan, plan, job, d, kDirection);
    Spans spans(scan, plan, job, kDirection);
    Span span;
    // The map of steps to the right, of U steps with it.
    const auto pull = [&]<int U>(int64_t position, States& a, States& m) {
      const Row<const typename F::T> g(scan, scan.grad_h, span.row, d);
      Vector<typename F::T, F::W> grad[U];
      load_steps<F, U>(g, position, grad);
      [[maybe_unused]] Tile<F, kFromEvents ? 1 : U> tile;
      [[maybe_unused]] Vector<int32_t, F::W> codes;
      if constexpr (kFromEvents) codes = events.at(position);
      else tile = Tile<F, U>(scan, span.row, d, position);
#pragma unroll
      for (int t = U - 1; t >= 0; --t) {
#pragma unroll
        for (int w = 0; w < F::W; ++w) {
          const typename F::S lambda = product_sum(real(alpha.at[w]), widen(grad[t], w), m.at[w]);
          if constexpr (kFromEvents) {
            const int code = codes.at[w] >> t & kEventMask;
            m.at[w] = cell.pull_event(code, lambda);
            a.at[w] = cell.pull_event(code, a.at[w]);
          } else {
            typename F::S x[F::kInputs];
            tile.inputs(t, w, channel, x);
            m.at[w] = cell.pull(x, lambda);
            a.at[w] = cell.pull(x, a.at[w]);
          }
          if constexpr (!kForgets) late.at[w] = recent(m.at[w], late.at[w]);
        }
      }
    };
    if constexpr (kForgets) {  // from the left: what comes after a write has no part in what leaves
      if (!spans.next(span)) return;
      const bool holds = for_tiles_while<kTile>(span.begin, span.end, [&]<int U>(int64_t position) {
        States of_tile = all<F>(1), passed = all<F>(0);
        pull.template operator()<U>(position, of_tile, passed);
        return append<F>(of_tile, passed, a, m);
      });
      if (holds && span.last) append<F>(a, load_states<F>(scan.grad_final, span.sequence, scan.channels, d), a, m);
      forget = span.last;
    } else {
      while (spans.next(span)) {
        if (span.last) m = load_states<F>(scan.grad_final, span.sequence, scan.channels, d), forget = true;
        for_tiles_from_right<kTile>(span.begin, span.end,
                                    [&]<int U>(int64_t position) { pull.template operator()<U>(position, a, m); });
      }
    }
  });
  store_map<F>(call, job, d, forget, a, m, late);
}

}  // namespace mru::cuda
