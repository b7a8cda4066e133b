// The kernels that reduce a segment to one affine map of each channel: of the state, and of the adjoint m = dL/ds.
#pragma once
#include "rows.h"

namespace mru {
namespace {

// The map of a row, carried from step to step.
template <class F>
struct CarriedMap {
  using S = typename F::S;
  using Map = Affine<typename F::Value>;
  S *const a, *const b;
  CarriedRow<F> carried_a, carried_b;

  CarriedMap(MapRow map, int64_t n)
      : a(static_cast<S*>(map.a)), b(static_cast<S*>(map.b)), carried_a(a, n), carried_b(b, n) {}
  template <class L>
  MRU_INLINE Map get(L lanes, int64_t j) const {
    return {carried_a.get(lanes, a + j), carried_b.get(lanes, b + j)};
  }
  template <class L>
  MRU_INLINE void put(L lanes, int64_t j, const Map& map) {
    carried_b.put(lanes, b + j, map.b);
    carried_a.put(lanes, a + j, map.a);
  }
};

template <class F, int kTile>
void summarize_by(const Scan& scan, const Segment& segment, int64_t d0, int64_t d1, MapRow map, void* late) {
  using Value = typename F::Value;
  using Word = typename F::Word;
  constexpr bool kCodes = F::Cell::kCodes;
  const typename F::Cell cell(scan.scalars);
  const int64_t n = d1 - d0;
  CarriedMap<F> carried(map, n);
  LateRow<F> recently(late, n);
  Word last_word{};  // as CarriedRow::last
  if constexpr (kCodes)
    if (scan.codes) last_word = last_word_before<F>(scan, segment, d0, n);
  Inputs<F> in(scan, segment, segment.begin, d0);
  for (int64_t step = segment.begin; step < segment.end;) {
    const int64_t steps = tile_of<kTile>(step, segment.end);
    int32_t* const words = scan.codes ? word_row(scan, segment, step, d0) : nullptr;
    for_lanes<F>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
      const InputLanes<F, L> inputs(in, lanes, j);
      Affine<Value> m = carried.get(lanes, j);
      const bool is_late = recently.wants(segment.end - step - steps);
      typename F::RealValue magnitude{};
      if (is_late) magnitude = recently.get(lanes, j);
      Word word{};
      if (kCodes && words && shift_of(step) != 0) word = L::kFull ? load_word<F>(lanes, words + j) : last_word;
      for (int64_t i = 0; i < steps; ++i) {
        Value x[F::kInputs];
        inputs.load_at(i, x);
        if constexpr (kTile == 1) inputs.prefetch(kRowsAhead);
        m.b = cell.step(x, m.b);
        m.a = conj(cell.pull(x, conj(m.a)));
        if (is_late && recently.wants(segment.end - step - i - 1)) magnitude = recent(m.b, magnitude);
        if constexpr (kCodes) word |= cell.encode(x) << shift_of(step + i);
      }
      if (is_late) recently.put(lanes, j, magnitude);
      carried.put(lanes, j, m);
      if (kCodes && words) store_word<F>(lanes, words + j, word, last_word);
    });
    in.advance(steps);
    step += steps;
  }
}
template <class F>
void summarize(const Scan& scan, const Segment& segment, int64_t d0, int64_t d1, MapRow map, void* late) {
  with_tile(d1 - d0, [&]<int kTile>() { summarize_by<F, kTile>(scan, segment, d0, d1, map, late); });
}

template <class F, int kTile, bool kFromCodes>
void summarize_adjoint_by(const Scan& scan, const Segment& segment, int64_t d0, int64_t d1, MapRow map, void* late) {
  using Value = typename F::Value;
  using Word = typename F::Word;
  const typename F::Cell cell(scan.scalars);
  const int64_t n = d1 - d0;
  CarriedMap<F> carried(map, n);
  LateRow<F> recently(late, n);
  Inputs<F> in(scan, segment, segment.end, d0);
  Row<const typename F::T> g(scan, scan.grad_h, segment, segment.end, d0);
  for (int64_t end = segment.end; end > segment.begin;) {
    const int64_t steps = tile_before<kTile>(end, segment.begin), step = end - steps;
    if (scan.grad_checkpoints && !F::Cell::kAdjointSeesState && is_boundary(scan, segment, end)) {
      const auto* const grad = boundary_row<typename F::S>(scan, scan.grad_checkpoints, segment, end, d0);
      for_lanes<F>(n, [&](auto lanes, int64_t j) {
        carried.carried_b.put(lanes, carried.b + j, carried.get(lanes, j).b + load(lanes, grad + j));
      });
    }
    in.advance(-steps);
    g.advance(-steps);
    const int32_t* words = kFromCodes ? word_row(scan, segment, step, d0) : nullptr;
    for_lanes<F>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
      const InputLanes<F, L> inputs(in, lanes, j);
      Affine<Value> m = carried.get(lanes, j);
      const bool is_late = recently.wants(step - segment.begin);
      typename F::RealValue magnitude{};
      if (is_late) magnitude = recently.get(lanes, j);
      Word word{};
      if constexpr (kFromCodes) word = load_word<F>(lanes, words + j);
      for (int64_t i = steps; i-- > 0;) {
        Value x[F::kInputs];
        if constexpr (kFromCodes) inputs.load_channels(x);
        else inputs.load_at(i, x);
        if constexpr (kTile == 1 && !kFromCodes) inputs.prefetch(-kRowsAhead);
        const auto pull = [&](Value v) __attribute__((always_inline)) {
          if constexpr (kFromCodes) return cell.pull_code(word >> shift_of(step + i) & kCodeMask, v);
          else return cell.pull(x, v);
        };
        m.a = pull(m.a);
        if constexpr (!F::Cell::kAdjointSeesState) {
          const Value none{};  // neither state is looked at
          const Value grad = load(lanes, g.ahead(i) + j);
          if constexpr (kTile == 1) __builtin_prefetch(g.ahead(-kRowsAhead) + j, 0, 3);
          m.b = pull(cell.cotangent(x, none, none, grad, m.b));
          if (is_late && recently.wants(step + i - segment.begin)) magnitude = recent(m.b, magnitude);
        }
      }
      if (is_late) recently.put(lanes, j, magnitude);
      carried.put(lanes, j, m);
    });
    end = step;
  }
}
template <class F>
void summarize_adjoint(const Scan& scan, const Segment& segment, int64_t d0, int64_t d1, MapRow map, void* late) {
  with_tile(d1 - d0, [&]<int kTile>() {
    if constexpr (F::Cell::kCodes)
      if (scan.codes) return summarize_adjoint_by<F, kTile, true>(scan, segment, d0, d1, map, late);
    summarize_adjoint_by<F, kTile, false>(scan, segment, d0, d1, map, late);
  });
}

}  // namespace
}  // namespace mru
