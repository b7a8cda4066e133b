// Rows of affine maps and of states, channel by channel: the small kernels between the passes of a scan that is cut in time.
#pragma once
#include "../../sum.h"
#include "rows.h"

namespace mru {
namespace {

template <class F>
struct MapRows {
  using S = typename F::S;

  static Affine<S> at(MapRow map, int64_t j) { return {static_cast<S*>(map.a)[j], static_cast<S*>(map.b)[j]}; }
  static void put(MapRow map, int64_t j, Affine<S> value) {
    static_cast<S*>(map.a)[j] = value.a, static_cast<S*>(map.b)[j] = value.b;
  }

  static bool overwrites(const Scan& scan) {
    if constexpr (F::Cell::kOverwrites) return typename F::Cell(scan.scalars).overwrites();
    else return false;
  }

  static void enter(const Scan& scan, void* state) {
    const typename F::Cell cell(scan.scalars);
    S* const s = static_cast<S*>(state);
    for (int64_t j = 0; j < scan.channels; ++j) {
      S x[F::kInputs] = {};
      for (int i = 0; i < F::kInputs; ++i)
        if (F::per_channel(i)) x[i] = static_cast<const S*>(scan.in[i].channel)[j];
      s[j] = cell.enter(x, s[j]);
    }
  }

  static void fill_ones(int64_t n, void* row) {
    for (int64_t j = 0; j < n; ++j) static_cast<S*>(row)[j] = S(1);
  }

  static void identity(int64_t n, MapRow map) {
    for (int64_t j = 0; j < n; ++j) put(map, j, Affine<S>::identity());
  }

  static void head(int64_t n, const void* state, MapRow map) {
    for (int64_t j = 0; j < n; ++j) put(map, j, Affine<S>::head(static_cast<const S*>(state)[j]));
  }

  static void constant(int64_t n, const void* state, MapRow map) {
    for (int64_t j = 0; j < n; ++j) put(map, j, Affine<S>::constant(static_cast<const S*>(state)[j]));
  }

  static void take(int64_t n, void* m, void* sum, void* lost) {
    for (int64_t j = 0; j < n; ++j) {
      S& value = static_cast<S*>(m)[j];
      if (sum) {
        Sum<S> total{static_cast<S*>(sum)[j], static_cast<S*>(lost)[j]};
        total.add(value);
        static_cast<S*>(sum)[j] = total.sum, static_cast<S*>(lost)[j] = total.lost;
      }
      value = S(0);
    }
  }

  static void apply(int64_t n, bool overwrites, MapRow map, void* state) {
    S* const s = static_cast<S*>(state);
    for (int64_t j = 0; j < n; ++j) s[j] = overwrites ? at(map, j).apply_overwriting(s[j]) : at(map, j).apply(s[j]);
  }

  static void then(int64_t n, MapRow total, MapRow next) {
    for (int64_t j = 0; j < n; ++j) put(total, j, at(total, j).then(at(next, j)));
  }

  static bool look_through(int64_t n, MapRow far, MapRow near) {
    bool open = false;
    for (int64_t j = 0; j < n; ++j) {
      if (at(near, j).is_settled()) continue;
      put(near, j, at(far, j).then_overwriting(at(near, j)));
      open |= !at(near, j).is_settled();
    }
    return open;
  }

  static bool consistent(int64_t n, bool overwrites, MapRow map, const void* late, const void* entry, const void* exit,
                         const void* next) {
    const auto state = [](const void* row, int64_t j) { return static_cast<const S*>(row)[j]; };
    const auto* const lately = static_cast<const typename F::Real*>(late);
    bool all = true;
    for (int64_t j = 0; j < n; ++j) {
      const Affine<S> m = at(map, j);
      const S factor = m.is_head() ? S(0) : m.a;
      all &= mru::consistent(factor, m.b, lately[j], state(entry, j), state(exit, j), state(next, j), overwrites);
    }
    return all;
  }

  static bool absorb(int64_t n, const void* earlier, void* state) {
    const S* const from = static_cast<const S*>(earlier);
    S* const s = static_cast<S*>(state);
    bool changed = false;
    for (int64_t j = 0; j < n; ++j) {
      if (from[j] == from[j] || !(s[j] == s[j])) continue;
      s[j] = from[j];
      changed = true;
    }
    return changed;
  }
};

}  // namespace
}  // namespace mru
