// Write codes of 2 bits (maps/write_or_hold.h) in global memory and in registers, and the fast path of cells with codes
// whose every write overwrites the state (epsilon 0): a state is then the value written last, or the state on entry, so
// that steps only select.
#pragma once
#include "../maps/write_or_hold.h"
#include "streams.cuh"

namespace mru::cuda {

// ------------------------------------------------------------------------------------------------ global memory

// The codes of the 16 steps from a position on, a multiple of 16.
__device__ __forceinline__ int32_t* code_row(const Scan& scan, int64_t row, int64_t position, int64_t d) {
  return scan.codes + (row * scan.code_rows + position / kCodesPerWord) * scan.channels + d;
}

// The codes of a segment as a thread comes past them, from the left or (direction -1) from the right. A word is loaded
// while the thread works on the one before it.
template <class F>
class CodesAhead {
 public:
  __device__ __forceinline__ CodesAhead(const Scan& scan, const Plan& plan, int64_t segment, int64_t d, int direction)
      : scan_(scan), d_(d), row_(plan.row_of(segment)), ahead_by_(direction * kCodesPerWord) {
    begin_ = plan.in_row(segment) * scan.segment;
    end_ = begin_ + scan.segment < scan.time ? begin_ + scan.segment : scan.time;
  }
  // The codes from a position on: that of the first step is not shifted.
  __device__ __forceinline__ Vector<int32_t, F::W> at(int64_t position) {
    const int64_t first = position / kCodesPerWord * kCodesPerWord;
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
    return load<Traffic::kCodes, F::W>(static_cast<const int32_t*>(code_row(scan_, row_, position, d_)));
  }

  const Scan& scan_;
  const int64_t d_, row_;
  const int ahead_by_;
  int64_t begin_, end_, first_ = -1;
  Vector<int32_t, F::W> words_, ahead_;
};

// Writes the codes of a segment, word after word. A word may hold steps of several spans. Nothing where the call has no
// room for codes.
template <class F>
class CodeWriter {
 public:
  __device__ __forceinline__ CodeWriter(const Scan& scan, int64_t d) : scan_(scan), d_(d) {}
  // Begins the word of a position, unless it has begun. Returns the place of the position's step in it.
  __device__ __forceinline__ int begin(int64_t row, int64_t position) {
    const int before = position % kCodesPerWord;
    if (position - before != first_) {
      if (first_ >= 0) store_word(row);
      first_ = position - before;
      words_ = {};
    }
    return before;
  }
  __device__ __forceinline__ void add(int w, int before, int codes) { words_.at[w] |= codes << before; }
  __device__ __forceinline__ void end(int64_t row) const {
    if (first_ >= 0) store_word(row);
  }

 private:
  __device__ __forceinline__ void store_word(int64_t row) const {
    if (scan_.codes) store<Traffic::kCodes>(code_row(scan_, row, first_, d_), words_);
  }

  const Scan& scan_;
  const int64_t d_;
  Vector<int32_t, F::W> words_ = {};
  int64_t first_ = -1;  // position of the word's first step
};

// Collapses a word of codes into one, where writes overwrite: NaN if any step is NaN, else the last write, else hold.
__device__ __forceinline__ int last_of(int word) {
  const int writes = word & kWrites, nan = word >> 16 & kWrites & ~writes;
  const int last = writes == 0 ? kHold : word >> (31 - __clz(writes)) & kCodeMask;
  return nan != 0 ? kNan : last;
}

// ------------------------------------------------------------------------------------------------ states by selection

// The values of a thread's channels where writes overwrite. A value V is one channel, or two of streams of 16 bits. Where
// the cell itself decides by them (kDecides), they can be pairs only if every input that decides is such a stream.
template <class F, bool kDecides = true>
struct Selection {
  using Cell = typename F::Cell;
  using S = typename F::S;
  using T = typename F::T;
  static constexpr bool kPairs = Cell::kCodes && sizeof(T) == 2 && F::W % 2 == 0 && (F::kStreamsDecide || !kDecides);
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
  // NaN stands for "nothing was written yet".
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
    if constexpr (Cell::kCodes)
      return select(cell.writes(x), cell.value(x, splat<V>(Cell::kFirstValue), splat<V>(Cell::kSecondValue)), before);
    else return cell.recompute(x, before);
  }
  // x^2 of the inputs that decide is added to `squared`, which becomes NaN if one of them is NaN.
  static __device__ __forceinline__ V with_squares(const V* x, V squared) {
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i)
      if (F::decides(i)) squared = squares(x[i], squared);
    return squared;
  }
  // The map of steps, a and u; nothing was written where `last` is NaN.
  static __device__ __forceinline__ void as_map(const Values& last, typename F::States& a, typename F::States& u) {
#pragma unroll
    for (int w = 0; w < F::W; ++w) {
      const S s = at(last, w);
      const Affine<S> map = is_nan(s) ? Affine<S>::identity() : Affine<S>::constant(s);
      a.at[w] = map.a, u.at[w] = map.b;
    }
  }

  // h of states s, as it is stored.
  static __device__ __forceinline__ Values output(const Cell& cell, const ChannelInputs<F>& channel,
                                                  const typename F::States& s) {
    typename F::States h;
#pragma unroll
    for (int w = 0; w < F::W; ++w) {
      S x[F::kInputs];
      channel.at(w, x);
      h.at[w] = cell.output(x, s.at[w], s.at[w]);
    }
    if constexpr (kPairs) return bits_as<Values>(narrow<T>(h));
    else return h;
  }
  template <Traffic kind = Traffic::kStream>
  static __device__ __forceinline__ void store_h(T* at, const Values& h) {
    if constexpr (kPairs) store<kind>(at, bits_as<Vector<T, F::W>>(h));
    else store<kind>(at, narrow<T>(h));
  }
};

// h of a cell with codes where writes overwrite: of the first value, of the second, and of the state that is held.
template <class F, bool kDecides = true>
struct Outputs {
  using Of = Selection<F, kDecides>;
  typename Of::Values first, second, held;

  __device__ __forceinline__ Outputs(const typename F::Cell& cell, const ChannelInputs<F>& channel,
                                     const typename F::States& s)
      : first(Of::output(cell, channel, all<F>(F::Cell::kFirstValue))),
        second(Of::output(cell, channel, all<F>(F::Cell::kSecondValue))),
        held(Of::output(cell, channel, s)) {}
};

// Codes of a thread's channels as planes of masks; those of a pair lie side by side.
template <class F, bool kDecides = true>
struct CodePlanes {
  using Of = Selection<F, kDecides>;
  uint32_t writes[F::W / Of::kEach] = {}, second[F::W / Of::kEach] = {};

  CodePlanes() = default;
  __device__ __forceinline__ explicit CodePlanes(const Vector<int32_t, F::W>& words) {
#pragma unroll
    for (int i = 0; i < F::W / Of::kEach; ++i) {
      if constexpr (Of::kPairs) {
        const uint32_t low = words.at[2 * i], high = words.at[2 * i + 1];
        writes[i] = (low & 0xffff) | high << 16, second[i] = low >> 16 | (high & 0xffff0000);
      } else {
        writes[i] = words.at[i], second[i] = uint32_t(words.at[i]) >> 16;
      }
    }
  }
  static __device__ __forceinline__ typename Of::Mask mask(uint32_t plane, int t) {
    if constexpr (Of::kPairs) return {plane << (15 - t)};
    else return plane >> t & 1;
  }
  // For pairs: adds step t of the i-th pair.
  __device__ __forceinline__ void add(int i, int t, PairMask wrote, PairMask is_second) {
    writes[i] |= wrote.bits >> (15 - t) & 0x00010001u << t;
    second[i] |= is_second.bits >> (15 - t) & 0x00010001u << t;
  }
  // For pairs: the words of all channels.
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

}  // namespace mru::cuda
