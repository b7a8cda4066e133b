// Cutting time never changes what a whole scan says: where composed states leave the range of their dtype, the call is
// scanned again whole.
//
// A scan that is cut composes its segments, each as a map s -> factor s + offset, to the states that enter them. That goes
// wrong where numbers leave the range of the dtype: a factor that overflows or underflows, an offset that overflows alone.
// So it is checked: the state that leaves a segment must be the one that was handed to the next segment.
#pragma once
#include "lanes.h"

namespace mru {

template <class V>
MRU_INLINE V magnitude(V x) {
  return Lanes<V>::abs(x);
}
template <class V>
MRU_INLINE V magnitude(Complex<V> x) {
  return Lanes<V>::abs(x.re) + Lanes<V>::abs(x.im);
}

// The largest magnitude of late: `u` after a step, and what it was before, of which little counts a few steps later.
template <class V>
MRU_INLINE auto recent(V u, typename RealOf<V>::type before) {
  using Real = typename RealOf<V>::type;
  const Real m = magnitude(u), faded = splat<Real>(0.25f) * before;
  return m > faded ? m : faded;
}
constexpr int kRecent = 8;  // steps after which nothing counts

// Whether `exit`, which the scan of a segment from `entry` on leaves, is `next`, which composing gave the next segment. The
// same for m of the adjoint. `forgets`: factors are 0 or 1, as where epsilon is 0, so that none underflows.
//
// Rounding must pass, so the bound is loose. Where factor entry and offset are both small by chance, rounding is measured by
// `late`, what the offset was in the last steps (`recent`). A factor that may have underflowed has few right bits.
template <class S>
MRU_INLINE bool consistent(S factor, S offset, typename RealOf<S>::type late, S entry, S exit, S next, bool forgets) {
  using Real = typename RealOf<S>::type;
  constexpr Real kUnderflows = Real(1) / (int64_t(1) << 62), kLoose = Real(1) / 256;
  constexpr Real kRounding = Real(1) / (int64_t(1) << (sizeof(Real) == 8 ? 40 : 16));
  if (exit == next || (exit != exit && next != next)) return true;
  const Real error = magnitude(exit + Real(-1) * next);
  if (forgets) return error - error == 0;
  const Real a = magnitude(factor), terms = a * magnitude(entry) + magnitude(offset);
  const Real bound = (a < kUnderflows ? kRounding : kLoose) * terms + kRounding * late;
  return error <= bound && bound - bound == 0;
}

}  // namespace mru
