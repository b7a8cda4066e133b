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
  return std::fabs(x);
}
template <class V>
MRU_INLINE V magnitude(Complex<V> x) {
  return std::fabs(x.re) + std::fabs(x.im);
}

// Whether `exit`, which the scan of a segment from `entry` on leaves, is `next`, which composing gave the next segment. The
// same for m of the adjoint. `forgets`: factors are 0 or 1, as where epsilon is 0, so that none underflows.
//
// Rounding must pass. It is at most kRounding of `entry` where factor entry and offset are both small by chance. Of a
// factor that may have underflowed nothing else is left by chance, and few of its bits may be right.
template <class S>
MRU_INLINE bool consistent(S factor, S offset, S entry, S exit, S next, bool forgets) {
  using Real = typename RealOf<S>::type;
  constexpr Real kUnderflows = Real(1) / (int64_t(1) << 62), kLoose = Real(1) / 256;
  constexpr Real kRounding = Real(1) / (int64_t(1) << (sizeof(Real) == 8 ? 40 : 16));
  if (exit == next || (exit != exit && next != next)) return true;
  const Real error = magnitude(exit + Real(-1) * next);
  if (forgets) return error - error == 0;
  const Real a = magnitude(factor), before = magnitude(entry), terms = a * before + magnitude(offset);
  const Real bound = a < kUnderflows ? kRounding * terms : kLoose * terms + kRounding * before;
  return error <= bound && bound - bound == 0;
}

}  // namespace mru
