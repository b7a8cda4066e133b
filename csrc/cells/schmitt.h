// First-quadrant bistable unit, a Schmitt trigger. arXiv 2605.15216.
//
//   L = H(c - low)    U = H(c - high)    hold = L (1 - U)    s' = hold s + (1 - hold) (U + epsilon s)    h = alpha s'
#pragma once
#include "../maps/write_or_hold.h"
#include "../surrogate.h"

namespace mru {

template <class S>
struct Schmitt : WriteOrHold<Schmitt<S>, S> {
  using Base = WriteOrHold<Schmitt, S>;
  static constexpr bool kCodes = true;
  static constexpr int kFirstValue = 1, kSecondValue = 0;
  static constexpr int kAlpha = 3;

  Surrogate<S> surrogate;

  // scalars: epsilon, surrogate_scale
  MRU_INLINE explicit Schmitt(const double* scalars) : Base(S(scalars[0])), surrogate(scalars[1]) {}

  template <class V>
  static MRU_INLINE auto lower(const V* x) {
    return x[0] >= x[1];
  }
  template <class V>
  static MRU_INLINE auto upper(const V* x) {
    return x[0] >= x[2];
  }
  template <class V>
  static MRU_INLINE auto writes(const V* x) {
    return (x[0] < x[1]) | upper(x);
  }
  template <class V>
  static MRU_INLINE auto has_nan(const V* x) {
    return (x[0] != x[0]) | (x[1] != x[1]) | (x[2] != x[2]);
  }
  template <class V>
  static MRU_INLINE V written(const V* x) {
    return value(x, splat<V>(kFirstValue), splat<V>(kSecondValue));
  }
  template <class V>
  static MRU_INLINE V value(const V* x, V first, V second) {
    return upper(x) ? first : second;
  }
  template <class V>
  static MRU_INLINE auto is_second(const V* x) {
    return !upper(x);
  }

  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V after, V g, V m, V* dx) const {
    const V zero = splat<V>(0), u = upper(x) ? splat<V>(1) : zero;
    const V lambda = this->cotangent(x, s, after, g, m), gained = lambda * splat<V>(surrogate.gain);
    const V dhold = gained * (splat<V>(1 - this->epsilon) * s - u);
    const V passed = writes(x) ? gained : zero;
    const V dupper = (lower(x) ? passed - dhold : passed) * step_slope(x[0] - x[2], surrogate);
    const V dlower = (upper(x) ? zero : dhold) * step_slope(x[0] - x[1], surrogate);
    dx[0] = dupper + dlower;
    dx[1] = -dlower;
    dx[2] = -dupper;
    dx[kAlpha] = g * after;
    return this->pull(x, lambda);
  }
};

namespace cells {
struct schmitt : Declaration<schmitt> {
  static constexpr InputKind kInputs[] = {kStream, kChannel, kChannel, optional(kChannel)};
  static constexpr Scalar kScalars[] = {{"epsilon", 0, 1}, positive("surrogate_scale")};
  static constexpr bool kComplex = false;
  template <class S, unsigned>
  using Cell = Schmitt<S>;
};
}  // namespace cells

}  // namespace mru
