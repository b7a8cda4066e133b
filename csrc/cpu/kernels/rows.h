// What the kernels have in common: rows of streams, states and write codes, and the loops over a row's lanes.
// Included once per instruction set and cell, by kernels.cpp: everything is local to that file or always inlined, so that
// no code of one instruction set can be linked into another's.
#pragma once
#include "../../cell.h"
#include "../../maps/affine.h"
#include "../../maps/cut.h"
#include "../../maps/write_or_hold.h"
#include "kernels.h"
#include "vector.h"

namespace mru {
namespace {

constexpr int64_t kFewChannels = 32;  // see with_tile
constexpr int64_t kRowsAhead = 4;     // rows that are prefetched; hardware prefetches too few

// The types of the kernels of a cell. C: its declaration; Element: of the streams; kGiven, kChannels: bit i is set if
// input i is given, and if it comes per channel.
template <class C, class Element, unsigned kGiven, unsigned kChannels>
struct Form {
  using T = Element;
  using S = typename C::template State<T>;
  using Real = typename RealOf<S>::type;
  using Cell = typename C::template Cell<S, kGiven>;
  static constexpr int kLanes = kVectorBytes / sizeof(Real);
  using Value = Vector<S, kLanes>;
  using RealValue = Vector<Real, kLanes>;
  using Word = typename Lanes<Value>::Int;  // codes of 16 steps, in lanes as wide as the state's

  static constexpr int kInputs = C::inputs();
  static constexpr unsigned kPerChannel = kChannels;
  static constexpr bool per_channel(int i) { return kChannels >> i & 1; }
  static constexpr bool is_stream(int i) { return kGiven >> i & 1 && !per_channel(i); }
  static constexpr bool is_optional(int i) { return C::kInputs[i].optional; }
  // Inputs per channel that are not optional.
  static constexpr unsigned kRequired = kChannels & ~(C::optional_streams() | C::optional_channels());
  static constexpr int kStreams = __builtin_popcount(kGiven & ~kChannels);
  static constexpr int kSums = __builtin_popcount(kChannels);
  static constexpr int sum_row(int i) { return __builtin_popcount(kChannels & ((1u << i) - 1)); }
};

// Calls f(lanes, j) for the vectors that cover channels [0, n) from j on.
template <class F, class Each>
MRU_INLINE void for_lanes(int64_t n, Each each) {
  int64_t j = 0;
  for (; j + F::kLanes <= n; j += F::kLanes) each(Full<F::kLanes>{}, j);
  if (j < n) each(Partial<F::kLanes>{int(n - j)}, j);
}

// Calls f<steps>() with the number of steps that a group of lanes takes before the next group does. Few channels keep their
// state in registers over a word of codes, while all rows stay in the first-level cache; many channels go row by row, in the
// order of memory.
template <class Each>
MRU_INLINE void with_tile(int64_t channels, Each each) {
  if (channels <= kFewChannels) each.template operator()<kCodesPerWord>();
  else each.template operator()<1>();
}
// The steps of the tile from `step` on. Tiles begin at multiples of kTile; the first and the last may be shorter.
template <int kTile>
MRU_INLINE int64_t tile_of(int64_t step, int64_t end) {
  const int64_t whole = kTile - step % kTile;
  return end - step < whole ? end - step : whole;
}
// The same for the tile on the left of `end`.
template <int kTile>
MRU_INLINE int64_t tile_before(int64_t end, int64_t begin) {
  const int64_t whole = (end - 1) % kTile + 1;
  return end - begin < whole ? end - begin : whole;
}

// A row of a stream that moves along the scan.
template <class T>
struct Row {
  T* at = nullptr;
  int64_t step = 0;

  Row() = default;
  Row(const Scan& scan, const Stream& stream, const Segment& segment, int64_t position, int64_t d0) {
    const int64_t scanned = segment.start + position;
    const int64_t t = scan.reverse ? scan.time - 1 - scanned : scanned;
    at = static_cast<T*>(stream.data) + segment.batch * stream.batch + t * stream.time + d0;
    step = scan.reverse ? -stream.time : stream.time;
  }
  MRU_INLINE void advance(int64_t steps = 1) { at += steps * step; }
  MRU_INLINE T* ahead(int64_t steps) const { return at + steps * step; }
};

// A row of a result [n]. kMay: whether it can take non-temporal stores, so whether those that fill a line follow each other: rows
// are written one by one, or a store is a line.
template <class F, int kTile>
struct ResultRow : Row<typename F::T> {
  using T = typename F::T;
  static constexpr int64_t kStore = sizeof(T) * F::kLanes;
  static constexpr bool kMay = kHasNonTemporal && (kTile == 1 ? kStore >= 16 : kStore >= kLine);
  bool non_temporal = false;

  ResultRow() = default;
  ResultRow(const Scan& scan, const Stream& stream, const Segment& segment, int64_t position, int64_t d0, int64_t n)
      : Row<T>(scan, stream, segment, position, d0),
        non_temporal(kMay && scan.non_temporal && are_whole_lines(this->at, this->step, n)) {}
  // A line that a non-temporal store fills need not be read.
  template <int kLocality>
  MRU_INLINE void prefetch(int64_t steps, int64_t j) const {
    if (!(kMay && non_temporal)) __builtin_prefetch(this->ahead(steps) + j, 1, kLocality);
  }
  template <class L, class V>
  MRU_INLINE void put(L lanes, int64_t steps, int64_t j, V v) const {
    store_result<kMay>(non_temporal, lanes, this->ahead(steps) + j, v);
  }
};

// The inputs of a cell: a row of each stream, and [n] of each input that comes per channel.
template <class F>
struct Inputs {
  Row<const typename F::T> row[F::kInputs];
  const typename F::S* channel[F::kInputs];

  Inputs(const Scan& scan, const Segment& segment, int64_t position, int64_t d0) {
    for (int i = 0; i < F::kInputs; ++i) {
      if (F::per_channel(i)) channel[i] = static_cast<const typename F::S*>(scan.in[i].channel) + d0;
      if (F::is_stream(i)) row[i] = {scan, scan.in[i].stream, segment, position, d0};
    }
  }
  MRU_INLINE void advance(int64_t steps = 1) {
    for (int i = 0; i < F::kInputs; ++i)
      if (F::is_stream(i)) row[i].advance(steps);
  }
};

// The inputs in the lanes of one vector.
template <class F, class L>
struct InputLanes {
  using Value = typename F::Value;
  const Inputs<F>& in;
  const L lanes;
  const int64_t j;
  Value constant[F::kInputs];

  MRU_INLINE InputLanes(const Inputs<F>& in, L lanes, int64_t j) : in(in), lanes(lanes), j(j) {
    for (int i = 0; i < F::kInputs; ++i)
      if (F::per_channel(i)) constant[i] = load(lanes, in.channel[i] + j);
  }
  MRU_INLINE void prefetch(int64_t ahead) const {
    for (int i = 0; i < F::kInputs; ++i)
      if (F::is_stream(i)) __builtin_prefetch(in.row[i].ahead(ahead) + j, 0, 3);
  }
  // The inputs per channel.
  MRU_INLINE void load_channels(Value* x) const {
    for (int i = 0; i < F::kInputs; ++i)
      if (F::per_channel(i)) x[i] = constant[i];
  }
  // All inputs of the step that is `ahead` of the rows.
  MRU_INLINE void load_at(int64_t ahead, Value* x) const {
    load_channels(x);
    for (int i = 0; i < F::kInputs; ++i)
      if (F::is_stream(i)) x[i] = load(lanes, in.row[i].ahead(ahead) + j);
  }
};

// A row that is carried from step to step. If the last vector is partial, its value is also kept in a register: a load that
// follows a masked store to the same address waits until the store has reached the cache.
template <class F>
struct CarriedRow {
  using S = typename F::S;
  using Value = typename F::Value;
  Value last{};

  CarriedRow() = default;
  CarriedRow(const S* row, int64_t n) {
    const int count = n % F::kLanes;
    if (count > 0) last = load(Partial<F::kLanes>{count}, row + n - count);
  }
  template <class L>
  MRU_INLINE Value get(L lanes, const S* p) const {
    return L::kFull ? load(lanes, p) : last;
  }
  template <class L>
  MRU_INLINE void put(L lanes, S* p, Value v) {
    store(lanes, p, v);
    if (!L::kFull) last = v;
  }
};

// Magnitudes of the last states of a segment (`recent` of maps/cut.h). `row`: one per channel; null if not wanted.
template <class F>
struct LateRow {
  using Real = typename F::Real;
  Real* row;

  LateRow(void* late, int64_t n) : row(static_cast<Real*>(late)) {
    for (int64_t j = 0; row && j < n; ++j) row[j] = 0;
  }
  // Whether a step that `more` steps of the segment follow still counts.
  MRU_INLINE bool wants(int64_t more) const { return row && more < kRecent; }
  template <class L>
  MRU_INLINE typename F::RealValue get(L lanes, int64_t j) const {
    return load(lanes, row + j);
  }
  template <class L>
  MRU_INLINE void put(L lanes, int64_t j, typename F::RealValue m) {
    store(lanes, row + j, m);
  }
};

// The codes of the word that contains `step`: [n].
MRU_INLINE int32_t* word_row(const Scan& scan, const Segment& segment, int64_t step, int64_t d0) {
  const int64_t row = segment.batch * scan.code_rows + segment.word + step / kCodesPerWord;
  return scan.codes + row * scan.channels + d0;
}
MRU_INLINE int shift_of(int64_t step) { return step % kCodesPerWord; }

template <class F, class L>
MRU_INLINE typename F::Word load_word(L lanes, const int32_t* words) {
  return __builtin_convertvector(load_raw<Vector<int32_t, F::kLanes>>(lanes, words), typename F::Word);
}
// `last`: as CarriedRow::last.
template <class F, class L>
MRU_INLINE void store_word(L lanes, int32_t* words, typename F::Word word, typename F::Word& last) {
  store_raw(lanes, words, __builtin_convertvector(word, Vector<int32_t, F::kLanes>));
  if (!L::kFull) last = word;
}

// The value of `last_word` before `segment`: the codes of the steps before it in the same word.
template <class F>
MRU_INLINE typename F::Word last_word_before(const Scan& scan, const Segment& segment, int64_t d0, int64_t n) {
  const int count = n % F::kLanes;
  if (count == 0 || shift_of(segment.begin) == 0) return typename F::Word{};
  return load_word<F>(Partial<F::kLanes>{count}, word_row(scan, segment, segment.begin, d0) + n - count);
}

// Whether a state is saved after the steps before `step`.
MRU_INLINE bool is_boundary(const Scan& scan, const Segment& segment, int64_t step) {
  return step % scan.chunk == 0 && step < segment.length;
}
// The row [n] of `rows`, the checkpoints or their gradients, for a boundary.
template <class S>
MRU_INLINE S* boundary_row(const Scan& scan, const void* rows, const Segment& segment, int64_t step, int64_t d0) {
  const int64_t row = segment.batch * scan.checkpoint_rows + (segment.start + step) / scan.chunk - 1;
  return static_cast<S*>(const_cast<void*>(rows)) + row * scan.channels + d0;
}

}  // namespace
}  // namespace mru
