// What joins segments: their maps, adjoints and sums, row by row.
#pragma once
#include "backward.h"

namespace mru::softmax {
namespace {

template <class F>
void carry(const HeadScan& scan, const void* map_row, void* state_row) {
  using S = typename F::S;
  using V = typename F::V;
  const StateRow<S> map(scan, const_cast<void*>(map_row), 0), state(scan, state_row, 0);
  const int64_t group = scan.channels / scan.heads;
  for_lanes<F>(scan.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    SegmentMap<V> first{zero<V>(), load(lanes, state.Z + h), load(lanes, state.z + h)};
    const V k = then(first, SegmentMap<V>{load(lanes, map.decay + h), load(lanes, map.Z + h), load(lanes, map.z + h)});
    store(lanes, state.Z + h, first.Z), store(lanes, state.z + h, first.z);
    for (int64_t i = 0; i < least(F::kLanes, scan.heads - h); ++i)
      for_lanes<F>(group, [&](auto channels, int64_t g) __attribute__((always_inline)) {
        const int64_t d = (h + i) * group + g;
        store(channels, state.mean + d,
              mix(splat<V>(k[i]), load(channels, state.mean + d), load(channels, map.mean + d)));
      });
  });
}

template <class F>
void carry_adjoint(const HeadScan& scan, const void* map_row, const void* start_row, const void* end_row,
                   const void* offset_row, void* adjoint_row) {
  using S = typename F::S;
  using V = typename F::V;
  const StateRow<S> map(scan, const_cast<void*>(map_row), 0), start(scan, const_cast<void*>(start_row), 0),
      end(scan, const_cast<void*>(end_row), 0), offset(scan, const_cast<void*>(offset_row), 0),
      adjoint(scan, adjoint_row, 0);
  const int64_t group = scan.channels / scan.heads;
  for_lanes<F>(scan.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    const V f = adjoint_factor(Pair<V>{load(lanes, start.Z + h), load(lanes, start.z + h)},
                               Pair<V>{load(lanes, end.Z + h), load(lanes, end.z + h)}, load(lanes, map.decay + h));
    for (int64_t i = 0; i < least(F::kLanes, scan.heads - h); ++i) {
      S parts[kMostLanes] = {};
      for_lanes<F>(group, [&](auto channels, int64_t g) __attribute__((always_inline)) {
        const int64_t d = (h + i) * group + g;
        const V d_mean = load(channels, adjoint.mean + d);
        const V moved = load(channels, start.mean + d) - load(channels, end.mean + d);
        add_part<F>(channels, parts, g, d_mean * moved);
        store(channels, adjoint.mean + d, splat<V>(f[i]) * d_mean + load(channels, offset.mean + d));
      });
      S& d_Z = adjoint.Z[h + i];
      d_Z = f[i] * (d_Z + sum_of_parts(parts)) + offset.Z[h + i];
    }
  });
}

template <class F>
void total(const HeadScan& scan, const void* sums, int64_t count, int which, void* total) {
  using S = typename F::S;
  for_lanes<F>(scan.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    Sum<typename F::V> all;
    for (int64_t i = 0; i < count; ++i) {
      const S* const row = static_cast<const S*>(sums) + (4 * i + which) * scan.heads + h;
      all.add(load(lanes, row));
      all.lost += load(lanes, row + scan.heads);
    }
    store(lanes, static_cast<S*>(total) + h, all.total());
  });
}

}  // namespace
}  // namespace mru::softmax
