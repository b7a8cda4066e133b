// Spikes: the step function H(v - threshold) of a state, with one of five surrogate derivatives.
// mru_kernels/cells/spikes.py has the names of the surrogates, in the order of their codes.
#pragma once
#include "surrogate.h"

namespace mru {

enum class SlopeOf { kAtan, kFastSigmoid, kSigmoid, kTriangle, kStraightThrough };

template <class S>
struct Spike {
  static constexpr double kLeast = std::numeric_limits<S>::min(), kMost = std::numeric_limits<S>::max();

  SlopeOf slope_of;
  bool tie;  // whether a state equal to the threshold fires
  S k;       // steepness, a normal number: its product with infinity is infinite
  Surrogate<S> atan;

  MRU_INLINE Spike(SlopeOf slope_of, bool tie, double steepness)
      : slope_of(slope_of), tie(tie), k(S(std::fmin(std::fmax(steepness, kLeast), kMost))), atan(steepness) {}

  // It compares and does not subtract: infinity against infinity is a tie. NaN does not fire.
  template <class V>
  MRU_INLINE auto fires(V v, V threshold) const {
    return tie ? v >= threshold : v > threshold;
  }
  // The output of a cell that spikes: 1 or 0, and NaN where v is NaN.
  template <class V>
  MRU_INLINE V emit(V v, V threshold) const {
    const V spike = fires(v, threshold) ? splat<V>(1) : splat<V>(0);
    return v == v ? spike : v;
  }
  // g sigma'(v - threshold). The slope is 0 where v is infinite, but 1 everywhere for kStraightThrough.
  template <class V>
  MRU_INLINE V times_slope(V g, V v, V threshold) const {
    const V x = v - threshold, one = splat<V>(1);
    if (slope_of == SlopeOf::kAtan) return splat<V>(atan.gain) * g * step_slope(x, atan);
    if (slope_of == SlopeOf::kStraightThrough) return g;
    const V steep = splat<V>(k), far = steep * Lanes<V>::abs(x);
    if (slope_of == SlopeOf::kTriangle) return far > one ? splat<V>(0) : steep * (one - far) * g;
    if (slope_of == SlopeOf::kFastSigmoid) {
      const V near = reciprocal(one + far);
      return near * near * g;
    }
    const V e = Lanes<V>::exp(-far), near = reciprocal(one + e);
    return steep * (e * near * near) * g;
  }
};

}  // namespace mru
