// The forward pass over a segment of time, and the segment as a piece.
#pragma once
#include "../../sum.h"
#include "rows.h"

namespace mru::softmax {
namespace {

// How y and the mean are mixed at a step (Share::k).
template <class F>
struct Mixes {
  typename F::V y, mean;
};
template <class F>
MRU_INLINE Mixes<F> mixes_at(typename F::V score, typename F::V decay, typename F::V bonus,
                             Weight<typename F::V>& weight) {
  Mixes<F> mixes;
  if constexpr (F::kBonus) mixes.y = read(score, bonus, weight).k;
  mixes.mean = update<F::kDecay>(score, decay, weight).k;
  return mixes;
}

// Scans [begin, end) of one chunk. kOwn: every channel is a head. A row of y without data is not wanted.
template <class F, bool kOwn>
void forward_chunk(const Inputs<F>& in, Steps<typename F::T> y, int64_t begin, int64_t end, const Weights<F>& weights,
                   typename F::S* mean, typename F::S* mixes) {
  using S = typename F::S;
  using V = typename F::V;
  const int64_t heads = in.heads, tile = in.channels <= kFewChannels ? kTile : 1;
  const int64_t ahead = tile > kRowsAhead ? tile : kRowsAhead;
  // The steps [t0, t1) of a vector of channels. `mixes` has the rows of head h from the step `from` on.
  const auto channels = [&](auto lanes, int64_t d, int64_t h, int64_t from, int64_t t0, int64_t t1)
                            __attribute__((always_inline)) {
                              V mean_now = load(lanes, mean + d);
                              Weight<V> w;
                              V bonus;
                              if constexpr (kOwn) w = weights.get(lanes, d), bonus = in.bonus_at(lanes, d);
                              for (int64_t t = t0; t < t1; ++t) {
                                Mixes<F> k;
                                if constexpr (kOwn) {
                                  prefetch(in.scores.row(t + ahead) + d);
                                  k = mixes_at<F>(in.score_at(lanes, d, t), in.decay_at(lanes, d, t), bonus, w);
                                } else {
                                  const S* const row = mixes + 2 * (t - from) * heads + h;
                                  k.mean = splat<V>(row[0]);
                                  if constexpr (F::kBonus) k.y = splat<V>(row[heads]);
                                }
                                const V v = in.value_at(lanes, d, t);
                                prefetch(in.values.row(t + ahead) + d);
                                V result;
                                if constexpr (F::kBonus) result = mix(k.y, mean_now, v);
                                mean_now = mix(k.mean, mean_now, v);
                                if constexpr (!F::kBonus) result = mean_now;
                                if (!y.first) continue;
                                __builtin_prefetch(y.row(t + ahead) + d, 1, 3);
                                store(lanes, y.row(t) + d, result);
                              }
                              if constexpr (kOwn) weights.put(lanes, d, w);
                              store(lanes, mean + d, mean_now);
                            };
  for (int64_t step = begin; step < end; step += kTile) {
    const int64_t stop = least(step + kTile, end);
    if constexpr (!kOwn)
      for_lanes<F>(heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
        Weight<V> w = weights.get(lanes, h);
        const V bonus = in.bonus_at(lanes, h);
        for (int64_t t = step; t < stop; ++t) {
          const Mixes<F> k = mixes_at<F>(in.score_at(lanes, h, t), in.decay_at(lanes, h, t), bonus, w);
          S* const row = mixes + 2 * (t - step) * heads + h;
          store(lanes, row, k.mean);
          if constexpr (F::kBonus) store(lanes, row + heads, k.y);
        }
        weights.put(lanes, h, w);
      });
    for (int64_t t0 = step; t0 < stop; t0 += tile) {
      const int64_t t1 = least(t0 + tile, stop);
      if constexpr (kOwn) {
        for_lanes<F>(
            heads, [&](auto lanes, int64_t d) __attribute__((always_inline)) { channels(lanes, d, d, step, t0, t1); });
      } else {
        for (int64_t h = 0; h < heads; ++h)
          for_lanes<F>(in.group, [&](auto lanes, int64_t g) __attribute__((always_inline)) {
            channels(lanes, h * in.group + g, h, step, t0, t1);
          });
      }
    }
  }
}

template <class F, bool kOwn>
void scan_segment(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* row, void* scratch) {
  using S = typename F::S;
  const Inputs<F> in(scan, segment, h0, h1);
  const Steps<typename F::T> y(scan, scan.h, segment, h0 * in.group);
  const StateRow<S> state(scan, row, h0);
  const Weights<F> weights(static_cast<S*>(scratch), in.heads);
  for (int64_t begin = segment.begin, end; begin < segment.end; begin = end) {
    end = end_of_chunk(scan, segment, begin);
    weights.open_all(in.heads, state);
    forward_chunk<F, kOwn>(in, y, begin, end, weights, state.mean, weights.c + in.heads);
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
  const StateRow<typename F::S> piece(scan, row, h0);
  for_lanes<F>(in.heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    Sum<V> decays;
    if constexpr (F::kDecay)
      for (int64_t t = segment.begin; t < segment.end; ++t) decays.add(in.decay_at(lanes, j, t));
    store(lanes, piece.decay + j, decays.total());
  });
}

template <class F>
void summarize(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* row, void* scratch) {
  using S = typename F::S;
  const StateRow<S> piece(scan, row, h0);
  const int64_t heads = h1 - h0, channels = heads * (scan.channels / scan.heads);
  __builtin_memset(piece.mean, 0, channels * sizeof(S));
  __builtin_memset(piece.z, 0, heads * sizeof(S));
  for (int64_t j = 0; j < heads; ++j) piece.Z[j] = -kInfinity<S>;
  sum_decays<F>(scan, segment, h0, h1, row);
  HeadScan without_results = scan;
  without_results.h = {}, without_results.checkpoints = nullptr;
  forward<F>(without_results, segment, h0, h1, row, scratch);
}

}  // namespace
}  // namespace mru::softmax
