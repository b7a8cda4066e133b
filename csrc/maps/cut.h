// Checks a scan that is cut in time. Its results differ from those of a whole scan by rounding only: if composed states leave
// the range of their dtype, the call is scanned again whole.
//
// Each segment is a map s -> factor s + offset, and the composed maps give the state that enters each segment. They are wrong
// if a number leaves the range: a factor overflows or underflows, or an offset overflows alone. So the state that leaves a
// segment is compared with the state that the next segment was given.
#pragma once
#include "affine.h"

namespace mru {

template <class V>
MRU_INLINE V magnitude(V x) {
  return Lanes<V>::abs(x);
}
template <class V>
MRU_INLINE V magnitude(Complex<V> x) {
  return Lanes<V>::abs(x.re) + Lanes<V>::abs(x.im);
}

// The magnitude of the last few states: `before`, updated with the state u. An older state fades to nothing.
template <class V>
MRU_INLINE auto recent(V u, typename RealOf<V>::type before) {
  using Real = typename RealOf<V>::type;
  const Real m = magnitude(u), faded = splat<Real>(0.25f) * before;
  return m > faded ? m : faded;
}
constexpr int kRecent = 8;  // steps after which a state has faded

// Whether the state `exit`, to which a scan of the segment from `entry` leads, agrees with the state `next`, which composition
// gave the next segment. The same for m of the adjoint.
//
// late        recent magnitude (`recent`) of the states that end in `offset`
// overwrites  all factors are 0 or 1, as for epsilon = 0: none can underflow, and a wrong value is not finite
//
// The bound lets rounding pass. If cancellation leaves |factor * entry| + |offset| small, the rounding of the states before
// exceeds it; `late` measures these. A factor that may have underflowed has few right bits, so its bound is tight.
template <class S>
MRU_INLINE bool consistent(S factor, S offset, typename RealOf<S>::type late, S entry, S exit, S next,
                           bool overwrites) {
  using Real = typename RealOf<S>::type;
  constexpr Real kUnderflows = Real(1) / (int64_t(1) << 62), kLoose = Real(1) / 256;
  constexpr Real kRounding = Real(1) / (int64_t(1) << (sizeof(Real) == 8 ? 40 : 16));
  if (exit == next || (exit != exit && next != next)) return true;
  const Real error = magnitude(exit + Real(-1) * next);
  if (overwrites) return error - error == 0;
  const Real a = magnitude(factor), terms = a * magnitude(entry) + magnitude(offset);
  const Real bound = (a < kUnderflows ? kRounding : kLoose) * terms + kRounding * late;
  return error <= bound && bound - bound == 0;
}

}  // namespace mru
