// The forward pass over a segment of time, and the segment's map.
#pragma once
#include "../../sum.h"
#include "rows.h"

namespace mru::softmax {
namespace {

// Rows of the steps from `first` on, two a step: the ratios of heads (see Ratios), or k of y and of the mean (Share::k).
template <class F>
struct StepRows {
  using S = typename F::S;
  S* rows;
  int64_t heads, first;

  MRU_INLINE S* update(int64_t step) const { return rows + 2 * (step - first) * heads; }
  MRU_INLINE S* read(int64_t step) const { return update(step) + heads; }
  template <class L>
  MRU_INLINE void put(L lanes, int64_t j, int64_t step, typename F::V of_update, typename F::V of_read) const {
    store(lanes, update(step) + j, of_update);
    if constexpr (F::kBonus) store(lanes, read(step) + j, of_read);
  }
  template <class L>
  MRU_INLINE void put_ratios(L lanes, int64_t j, int64_t step, const Ratios<typename F::V>& ratios) const {
    store(lanes, update(step) + j, ratios.update);
    if constexpr (F::kBonus && !F::kOneRatio) store(lanes, read(step) + j, ratios.read);
  }
  template <class L>
  MRU_INLINE Ratios<typename F::V> ratios(L lanes, int64_t j, int64_t step) const {
    Ratios<typename F::V> ratios{load(lanes, update(step) + j), typename F::V{}};
    if constexpr (F::kBonus && !F::kOneRatio) ratios.read = load(lanes, read(step) + j);
    return ratios;
  }
};

// Stores the ratios of the steps [t0, t1) in `rows`, of kVectors vectors of heads from j on. This is a loop of its own over the
// heads, because the operations of a whole step depend on each other, and a processor does not look far enough ahead to overlap
// several steps. Within this loop two vectors overlap.
template <class F, int kVectors, class L>
MRU_INLINE void weigh_vectors(const Inputs<F>& in, const Weights<F>& weights, const StepRows<F>& rows, L lanes,
                              int64_t j, int64_t t0, int64_t t1, Sweep& ahead) {
  typename F::V m[kVectors], c[kVectors], read_factor[kVectors]{};
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = j + i * F::kLanes;
    m[i] = load(lanes, weights.m + at), c[i] = load(lanes, weights.c + at);
    if constexpr (F::kBonus) read_factor[i] = load(lanes, weights.read_factor + at);
  }
  for (int64_t t = t0; t < t1; ++t)
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = j + i * F::kLanes;
      ahead.template fetch<F::kLanes>(in.scores);
      const auto ratios = weigh_step(in, lanes, at, t, read_factor[i], m[i], c[i]);
      rows.put_ratios(lanes, at, t, ratios);
    }
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = j + i * F::kLanes;
    store(lanes, weights.m + at, m[i]), store(lanes, weights.c + at, c[i]);
  }
}
template <class F>
void weigh_steps(const Inputs<F> in, const Weights<F> weights, const StepRows<F> rows, int64_t t0, int64_t t1) {
  constexpr int kVectors = 2, kLanes = F::kLanes;
  Sweep ahead(t0 + kTile, t1 + kTile, in.heads);
  int64_t j = 0;
  for (; j + kVectors * kLanes <= in.heads; j += kVectors * kLanes)
    weigh_vectors<F, kVectors>(in, weights, rows, Full<kLanes>{}, j, t0, t1, ahead);
  if (j + kLanes <= in.heads) weigh_vectors<F, 1>(in, weights, rows, Full<kLanes>{}, j, t0, t1, ahead), j += kLanes;
  if (j < in.heads) weigh_vectors<F, 1>(in, weights, rows, Partial<kLanes>{int(in.heads - j)}, j, t0, t1, ahead);
}
// Calls each(step, shares) for the steps [t0, t1) of a vector of heads, from their ratios.
template <class F, class L, class Each>
MRU_INLINE void share_steps(const Weights<F>& weights, const StepRows<F>& rows, L lanes, int64_t j, int64_t t0,
                            int64_t t1, Each each) {
  using V = typename F::V;
  V q = load(lanes, weights.q + j), read_factor{};
  if constexpr (F::kBonus) read_factor = load(lanes, weights.read_factor + j);
  for (int64_t t = t0; t < t1; ++t) {
    const auto shares = share_step<F>(rows.ratios(lanes, j, t), read_factor, q);
    q = shares.update.total;
    each(t, shares);
  }
  store(lanes, weights.q + j, q);
}

// Scans [begin, end) of one chunk. kOwn: every channel is a head. A row of y without data is not wanted.
template <class F, bool kOwn>
void forward_chunk(const Inputs<F> in, const Results<F> y, int64_t begin, int64_t end, const Weights<F> weights,
                   typename F::S* mean, typename F::S* scratch) {
  using V = typename F::V;
  Sweep ahead(0, 0, in.channels);
  // A step of a vector of channels. `read` and `update` are what `mix` takes: a Share, or its k. `non_temporal`: y.non_temporal,
  // which a caller may know at compile time.
  const auto mix_step = [&](auto lanes, int64_t d, int64_t t, const auto& read, const auto& update, V& mean_now,
                            bool non_temporal) __attribute__((always_inline)) {
    const V v = in.value_at(lanes, d, t);
    V result{};
    if constexpr (F::kBonus) result = mix(read, mean_now, v);
    mean_now = mix(update, mean_now, v);
    if constexpr (!F::kBonus) result = mean_now;
    if constexpr (!kOwn) prefetch(in.values.row(t + kTile) + d);
    else if (y.first && !non_temporal) ahead.template fetch<F::kLanes>(in.values, y);
    else ahead.template fetch<F::kLanes>(in.values);
    if (!y.first) return;
    if (!kOwn && !non_temporal) __builtin_prefetch(y.row(t + kTile) + d, 1, 3);
    y.put(non_temporal, lanes, t, d, result);
  };
  for (int64_t step = begin; step < end; step += kTile) {
    const int64_t stop = least(step + kTile, end);
    const StepRows<F> rows{scratch, in.heads, step};
    ahead = Sweep(step + kTile, stop + kTile, in.channels);
    weigh_steps(in, weights, rows, step, stop);
    if constexpr (kOwn) {
      for_lanes<F>(in.heads, [&](auto lanes, int64_t d) __attribute__((always_inline)) {
        V mean_now = load(lanes, mean + d);
        share_steps(weights, rows, lanes, d, step, stop,
                    [&](int64_t t, const auto& shares) __attribute__((always_inline)) {
                      mix_step(lanes, d, t, shares.read, shares.update, mean_now, y.non_temporal);
                    });
        store(lanes, mean + d, mean_now);
      });
      continue;
    }
    for_lanes<F>(in.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
      share_steps(weights, rows, lanes, h, step, stop,
                  [&](int64_t t, const auto& shares)
                      __attribute__((always_inline)) { rows.put(lanes, h, t, shares.update.k, shares.read.k); });
    });
    for (int64_t h = 0; h < in.heads; ++h)
      for_lanes<F>(in.group, [&](auto lanes, int64_t g) __attribute__((always_inline)) {
        const int64_t d = h * in.group + g;
        V mean_now = load(lanes, mean + d);
        const auto mix_steps = [&](bool non_temporal) __attribute__((always_inline)) {
          for (int64_t t = step; t < stop; ++t) {
            V k_read{};
            if constexpr (F::kBonus) k_read = splat<V>(rows.read(t)[h]);
            mix_step(lanes, d, t, k_read, splat<V>(rows.update(t)[h]), mean_now, non_temporal);
          }
        };
        if (Results<F>::kMay && y.non_temporal) mix_steps(true);
        else mix_steps(false);
        store(lanes, mean + d, mean_now);
      });
  }
}

template <class F, bool kOwn>
void scan_segment(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* row, void* scratch) {
  using S = typename F::S;
  const Inputs<F> in(scan, segment, h0, h1);
  const Results<F> y(scan, scan.h, segment, h0 * in.group, kOwn ? in.channels : in.group);
  const StateRow<S> state(scan, row, h0);
  const Weights<F> weights(static_cast<S*>(scratch), in);
  for (int64_t begin = segment.begin, end; begin < segment.end; begin = end) {
    end = end_of_chunk(scan, segment, begin);
    weights.open_all(in.heads, state);
    forward_chunk<F, kOwn>(in, y, begin, end, weights, state.mean, weights.read_factor + in.heads);
    weights.close_all(in.heads, state);
    if (!scan.checkpoints || !is_border(scan, segment, end)) continue;
    const StateRow<S> border(scan, border_row<S>(scan, segment, end), h0);
    __builtin_memcpy(border.mean, state.mean, in.channels * sizeof(S));
    __builtin_memcpy(border.Z, state.Z, in.heads * sizeof(S));
    __builtin_memcpy(border.z, state.z, in.heads * sizeof(S));
  }
}

template <class F>
void forward(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* state, void* scratch) {
  if (scan.channels == scan.heads) scan_segment<F, true>(scan, segment, h0, h1, state, scratch);
  else scan_segment<F, false>(scan, segment, h0, h1, state, scratch);
}

template <class F>
void sum_decays(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* row) {
  using V = typename F::V;
  const Inputs<F> in(scan, segment, h0, h1);
  const StateRow<typename F::S> map(scan, row, h0);
  for_lanes<F>(in.heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    Sum<V> decays;
    if constexpr (F::kKind == Decay::kHead)  // a segment has a step, so an infinite decay gives no NaN
      decays.sum = splat<V>(segment.end - segment.begin) * in.decay_at(lanes, j, segment.begin);
    if constexpr (F::kKind == Decay::kStream)
      for (int64_t t = segment.begin; t < segment.end; ++t) decays.add(in.decay_at(lanes, j, t));
    store(lanes, map.decay + j, decays.total());
  });
}

template <class F>
void summarize(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* row, void* scratch) {
  using S = typename F::S;
  const StateRow<S> map(scan, row, h0);
  const int64_t heads = h1 - h0, channels = heads * (scan.channels / scan.heads);
  __builtin_memset(map.mean, 0, channels * sizeof(S));
  __builtin_memset(map.z, 0, heads * sizeof(S));
  for (int64_t j = 0; j < heads; ++j) map.Z[j] = -kInfinity<S>;
  sum_decays<F>(scan, segment, h0, h1, row);
  HeadScan without_results = scan;
  without_results.h = {}, without_results.checkpoints = nullptr;
  forward<F>(without_results, segment, h0, h1, row, scratch);
}

}  // namespace
}  // namespace mru::softmax
