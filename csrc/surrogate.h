// The surrogate derivatives of the unit step H and of sgn (arctangent surrogates, arXiv 2601.09495).
#pragma once
#include <cmath>
#include <cstdlib>
#include <limits>

#include "lanes.h"

namespace mru {

// The surrogate derivative of the unit step H, k / (1 + (pi k x)^2), in a form that is right for any finite k > 0:
//
//   gain / (tie + (bend x)^2)     tie = gain / k     bend = pi sqrt(k gain)     gain: a power of two
//
// `gain` is 1 if k and 1 / k are well within the range of S. Else it keeps `tie`, 1 / tie and `bend` normal numbers, as a
// processor may flush subnormals to zero. Slopes below gain / 2^126 in float32 may become 0. In float32, k is clamped to
// [2^-248, 2^186]; beyond it the results are 0 or infinity anyway, unless 0 < |x| < 2^-33.
template <class S>
struct Surrogate {
  S gain = 1, tie = 1, bend = 1;

  Surrogate() = default;
  MRU_INLINE explicit Surrogate(double k) {
    constexpr int kMost = std::numeric_limits<S>::max_exponent - 4;  // the exponent of k from which on gain is not 1
    const double least = std::ldexp(1.0, std::numeric_limits<S>::min_exponent - 1);  // the least normal number
    k = std::fmin(std::fmax(k, std::ldexp(1.0, -2 * kMost)), std::ldexp(1.0, kMost / 2 * 3));
    const int exponent = std::ilogb(k), past = exponent > 0 ? kMost : -kMost;
    const double power = std::ldexp(1.0, std::abs(exponent) > kMost ? exponent - past : 0);
    gain = S(power), tie = S(power / k);
    bend = S(std::fmax(3.14159265358979323846 * std::sqrt(k) * std::sqrt(power), least));  // not 0: x may be infinite
  }
};

// The slopes of H and of sgn, which is twice that of H, without their factor `gain`. The caller multiplies the gradient by
// `gain` first: a slope alone may be out of range where its product with the gradient is not.
template <class V, class S>
MRU_INLINE V slope(V x, S bend, S tie) {
  const V bent = x * splat<V>(bend);
  return reciprocal(multiply_add(bent, bent, splat<V>(tie)));
}
template <class V, class S>
MRU_INLINE V step_slope(V x, const Surrogate<S>& surrogate) {
  return slope(x, surrogate.bend, surrogate.tie);
}
template <class V, class S>
MRU_INLINE V sgn_slope(V x, const Surrogate<S>& surrogate) {
  return slope(x, surrogate.bend * S(0.70710678118654752440), surrogate.tie / 2);  // 1 / sqrt(2)
}

}  // namespace mru
