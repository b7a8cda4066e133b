// Bistable memory recurrent unit: BMRU (epsilon 0), CMRU (epsilon 1). arXiv 2601.09495, arXiv 2605.11855.
//
//   z = H(|c| - |b|)    v = m sgn(c)    s' = z (v + epsilon s) + (1 - z) s    h = alpha s'
#pragma once
#include "../maps/write_or_hold.h"
#include "../surrogate.h"

namespace mru {

template <class S, bool kAmplitude>
struct Bmru : WriteOrHold<Bmru<S, kAmplitude>, S> {
  using Base = WriteOrHold<Bmru, S>;
  static constexpr bool kCodes = !kAmplitude;  // an amplitude is written as it comes
  static constexpr int kFirstValue = 1, kSecondValue = -1;
  static constexpr int kAlpha = 3;

  Surrogate<S> surrogate;

  // scalars: epsilon, surrogate_scale
  MRU_INLINE explicit Bmru(const double* scalars) : Base(S(scalars[0])), surrogate(scalars[1]) {}

  // The gate compares and does not subtract, so a tie writes.
  template <class V>
  static MRU_INLINE auto writes(const V* x) {
    return Lanes<V>::abs(x[0]) >= Lanes<V>::abs(x[1]);
  }
  template <class V>
  static MRU_INLINE auto has_nan(const V* x) {
    const auto nan = (x[0] != x[0]) | (x[1] != x[1]);
    if constexpr (kAmplitude) return nan | (x[2] != x[2]);
    else return nan;
  }
  template <class V>
  static MRU_INLINE V amplitude(const V* x) {
    if constexpr (kAmplitude) return x[2];
    else return splat<V>(1);
  }
  template <class V>
  static MRU_INLINE V written(const V* x) {
    return flip_sign(amplitude(x), x[0]);
  }
  template <class V>
  static MRU_INLINE V value(const V* x, V first, V) {
    return flip_sign(first, x[0]);
  }
  template <class V>
  static MRU_INLINE auto is_second(const V* x) {
    return x[0] < splat<V>(0);
  }

  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V after, V g, V m, V* dx) const {
    const V lambda = this->cotangent(x, s, after, g, m), gained = lambda * splat<V>(surrogate.gain);
    const V dz = gained * multiply_add(splat<V>(this->epsilon - 1), s, written(x));
    const V dgate = dz * step_slope(Lanes<V>::abs(x[0]) - Lanes<V>::abs(x[1]), surrogate);
    const V passed = writes(x) ? gained : splat<V>(0);
    dx[0] = multiply_add(passed * amplitude(x), sgn_slope(x[0], surrogate), multiply_sign(dgate, x[0]));
    dx[1] = -multiply_sign(dgate, x[1]);
    if constexpr (kAmplitude) dx[2] = flip_sign(writes(x) ? lambda : splat<V>(0), x[0]);
    dx[kAlpha] = g * after;
    return this->pull(x, lambda);
  }
};

namespace cells {
struct bmru : Declaration<bmru> {
  static constexpr InputKind kInputs[] = {kStream, kEither, optional(kStream), optional(kChannel)};
  static constexpr Scalar kScalars[] = {{"epsilon", 0, 1}, positive("surrogate_scale")};
  static constexpr bool kComplex = false;
  // The cell if these inputs are given.
  template <class S, unsigned kGiven>
  using Cell = Bmru<S, (kGiven >> 2 & 1) != 0>;
};
}  // namespace cells

}  // namespace mru
