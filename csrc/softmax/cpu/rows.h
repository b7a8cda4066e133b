// Rows of streams and of states, for vectors of channels of a block of heads.
#pragma once
#include "functions.h"
#include "kernels.h"

namespace mru::softmax {
namespace {

enum class Decay { kNone, kHead, kStream };

// kIsModerate: is_moderate(scan), so |decay| and |decay + bonus| are at most kModerate.
template <class Element, Decay kDecayKind, bool kHasBonus, bool kIsModerate>
struct Form {
  using T = Element;
  using S = typename StateOf<T>::type;
  static constexpr int kLanes = kVectorBytes / sizeof(S);
  using V = Vector<S, kLanes>;
  static constexpr Decay kKind = kDecayKind;
  static constexpr bool kDecay = kDecayKind != Decay::kNone, kBonus = kHasBonus;
  static constexpr bool kFinite = kIsModerate;              // `weigh`
  static constexpr bool kOneRatio = kBonus && kIsModerate;  // whether read_and_update serves
  using WithoutBonus = Form<Element, kDecayKind, false, kIsModerate>;
  using OfStates = Form<S, Decay::kNone, false, true>;  // of kernels that see no stream: one for each state dtype
};

// Calls f(lanes, j) for the vectors that cover [0, n) from j on.
template <class F, class Each>
MRU_INLINE void for_lanes(int64_t n, Each each) {
  int64_t j = 0;
  for (; j + F::kLanes <= n; j += F::kLanes) each(Full<F::kLanes>{}, j);
  if (j < n) each(Partial<F::kLanes>{int(n - j)}, j);
}

// The rows of a stream in the order of the scan, from one channel on.
template <class T>
struct Steps {
  T* first = nullptr;
  int64_t by = 0;

  Steps(const HeadScan& scan, const Stream& stream, const Segment& segment, int64_t channel) {
    if (!stream.data) return;
    const int64_t at = scan.reverse ? scan.time - 1 - segment.start : segment.start;
    first = static_cast<T*>(stream.data) + segment.batch * stream.batch + at * stream.time + channel;
    by = scan.reverse ? -stream.time : stream.time;
  }
  T* row(int64_t step) const { return first + step * by; }
};

// Rows of a result. A vector's rows are written for several steps before the next vector's, so non-temporal stores serve only
// where a vector fills a line.
template <class F>
struct Results : Steps<typename F::T> {
  using T = typename F::T;
  static constexpr bool kMay = kHasNonTemporal && sizeof(T) * F::kLanes == kLine;
  bool non_temporal;

  // Vectors begin at multiples of `width` channels.
  Results(const HeadScan& scan, const Stream& stream, const Segment& segment, int64_t channel, int64_t width)
      : Steps<T>(scan, stream, segment, channel),
        non_temporal(kMay && scan.non_temporal && are_whole_lines(this->first, this->by, width)) {}
  template <class L, class V>
  MRU_INLINE void put(bool non_temporal, L lanes, int64_t step, int64_t j, V v) const {
    store_result<kMay>(non_temporal, lanes, this->row(step) + j, v);
  }
  template <class L, class V>
  MRU_INLINE void put(L lanes, int64_t step, int64_t j, V v) const {
    put(non_temporal, lanes, step, j, v);
  }
};

template <class T>
MRU_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 3);
}

// Prefetches the rows [row, end) into the second-level cache in the order of memory, one vector a call. Callers go through all
// steps of one vector before the next; prefetches in that order would take up to twice as long.
class Sweep {
 public:
  Sweep(int64_t row, int64_t end, int64_t columns) : row_(row), end_(end), columns_(columns) {}

  template <int kLanes, class... Rows>
  MRU_INLINE void fetch(const Rows&... streams) {
    if (row_ == end_) return;
    (__builtin_prefetch(streams.row(row_) + column_, 0, 2), ...);
    column_ += kLanes;
    if (column_ >= columns_) column_ = 0, ++row_;
  }

 private:
  int64_t row_, column_ = 0;
  int64_t end_, columns_;
};

// The inputs of the heads [h0, h1) and of their channels. Loops take this and the like by value: a store cannot change a copy, so
// nothing is loaded again.
template <class F>
struct Inputs {
  using T = typename F::T;
  using S = typename F::S;
  using V = typename F::V;
  int64_t heads, group, channels;  // of this block; `group` channels a head
  Steps<const T> scores, values, decays;
  const S *decay, *bonus;

  Inputs(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1)
      : heads(h1 - h0),
        group(scan.channels / scan.heads),
        channels(heads * group),
        scores(scan, scan.in[kScore].stream, segment, h0),
        values(scan, scan.in[kValue].stream, segment, h0 * group),
        decays(scan, scan.in[kDecay].stream, segment, h0),
        decay(F::kKind == Decay::kHead ? static_cast<const S*>(scan.in[kDecay].channel) + h0 : nullptr),
        bonus(F::kBonus ? static_cast<const S*>(scan.in[kBonus].channel) + h0 : nullptr) {}

  template <class L>
  MRU_INLINE V score_at(L lanes, int64_t j, int64_t step) const {
    return load(lanes, scores.row(step) + j);
  }
  template <class L>
  MRU_INLINE V decay_at(L lanes, int64_t j, int64_t step) const {
    if constexpr (F::kKind == Decay::kStream) return load(lanes, decays.row(step) + j);
    else if constexpr (F::kKind == Decay::kHead) return load(lanes, decay + j);
    else return zero<V>();
  }
  // What a step needs to read the past: e^(decay + bonus) for read_and_update, or the bonus.
  template <class L>
  MRU_INLINE V read_factor_at(L lanes, int64_t j) const {
    if constexpr (!F::kBonus) return zero<V>();
    else if constexpr (!F::kOneRatio) return load(lanes, bonus + j);
    const V x = decay_at(lanes, j, 0) + load(lanes, bonus + j), e = Functions<V>::exp_of_minus_abs(x);
    return x > zero<V>() ? reciprocal(e) : e;
  }
  template <class L>
  MRU_INLINE V value_at(L lanes, int64_t j, int64_t step) const {
    return load(lanes, values.row(step) + j);
  }
};

// A step of heads has two parts: `weigh_step` gives its ratios (Ratio::e), `share_step` what follows from them. With kOneRatio
// `read` is not used.
template <class V>
struct Ratios {
  V update, read;
};
template <class V>
MRU_INLINE Ratio<V> ratio_of(V e) {
  return {Functions<V>::has_sign(e), e};
}
template <class F, class L>
MRU_INLINE Ratios<typename F::V> weigh_step(const Inputs<F>& in, L lanes, int64_t j, int64_t step,
                                            typename F::V read_factor, typename F::V& m, typename F::V& c) {
  const auto score = in.score_at(lanes, j, step);
  Ratios<typename F::V> ratios{};
  if constexpr (F::kBonus && !F::kOneRatio) ratios.read = weigh_read(score, read_factor, m, c).e;
  ratios.update = weigh<F::kDecay, F::kFinite>(score, in.decay_at(lanes, j, step), m, c).e;
  return ratios;
}
template <class F>
MRU_INLINE ReadAndUpdate<typename F::V> share_step(const Ratios<typename F::V>& ratios, typename F::V read_factor,
                                                   typename F::V q) {
  const auto update = ratio_of(ratios.update);
  if constexpr (F::kOneRatio) return read_and_update(update, read_factor, q);
  ReadAndUpdate<typename F::V> shares;
  if constexpr (F::kBonus) shares.read = share(ratio_of(ratios.read), q);
  shares.update = share(update, q);
  return shares;
}

// The parts of a state row that belong to the heads [h0, h1).
template <class S>
struct StateRow {
  S *mean, *Z, *z, *decay;
  template <class Data>
  StateRow(const HeadScan& scan, Data* row, int64_t h0)
      : mean((S*)row + h0 * (scan.channels / scan.heads)),
        Z((S*)row + scan.channels + h0),
        z(Z + scan.heads),
        decay(z + scan.heads) {}
};

inline bool is_border(const HeadScan& scan, const Segment& segment, int64_t step) {
  return step % scan.chunk == 0 && step < segment.length;
}
// The row of the state that enters the chunk at `step` of the segment's sequence.
template <class S>
S* border_row(const HeadScan& scan, const Segment& segment, int64_t step) {
  const int64_t row = segment.batch * scan.checkpoint_rows + segment.start / scan.chunk + step / scan.chunk - 1;
  return static_cast<S*>(scan.checkpoints) + row * (scan.channels + 2 * scan.heads);
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t end_of_chunk(const HeadScan& scan, const Segment& segment, int64_t step) {
  return least((step / scan.chunk + 1) * scan.chunk, segment.end);
}

// The weights of heads inside a chunk, and what Inputs::read_factor_at gives, as rows.
template <class F>
struct Weights {
  using S = typename F::S;
  S *q, *m, *c, *read_factor;

  Weights(S* scratch, const Inputs<F>& in) : q(scratch), m(q + in.heads), c(m + in.heads), read_factor(c + in.heads) {
    if constexpr (F::kBonus)
      for_lanes<F>(in.heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        store(lanes, read_factor + j, in.read_factor_at(lanes, j));
      });
  }
  void open_all(int64_t heads, const StateRow<S>& state) const {
    for_lanes<F>(heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
      const auto w = open(load(lanes, state.Z + j), load(lanes, state.z + j));
      store(lanes, q + j, w.q), store(lanes, m + j, w.m), store(lanes, c + j, w.c);
    });
  }
  void close_all(int64_t heads, const StateRow<S>& state) const {
    for_lanes<F>(heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
      const auto pair = close(Weight<typename F::V>{load(lanes, q + j), load(lanes, m + j), load(lanes, c + j)});
      store(lanes, state.Z + j, pair.hi), store(lanes, state.z + j, pair.lo);
    });
  }
};

}  // namespace
}  // namespace mru::softmax
