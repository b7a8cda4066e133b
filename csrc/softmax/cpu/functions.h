// The functions of step.h for vectors of lanes.
#pragma once
#include "../../functions.h"
#include "../step.h"

namespace mru::softmax {

// a b + c, rounded once where the instruction set can. So results differ between instruction sets by rounding.
template <class V>
MRU_INLINE V fused(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename Lanes<V>::Scalar) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (sizeof(typename Lanes<V>::Scalar) == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// e^x for x <= 0, within 2 units in the last place; below e^-87 it is 0. Cody and Waite's reduction to |r| <= ln(2) / 2, and
// 1 + r p(r) with the p of least relative error, 9e-8.
template <class V>
MRU_INLINE V exp_of_float(V x) {
  constexpr float kPolynomial[] = {0x1.0fa7d8p-7f, 0x1.573ad0p-5f, 0x1.555a6ep-3f, 0x1.fffdc4p-2f, 0x1.fffff6p-1f};
  constexpr float kHigh = -0x1.63p-1f, kLow = 0x1.bd0106p-13f;  // -ln(2); n times the first is exact
  // Adding it rounds to an integer n. The lowest bits of the sum are the exponent of 2^n.
  constexpr float kRound = 0x1.8p23f + 127;
  const V shifted = fused(x, splat<V>(1.44269504f), splat<V>(kRound));
  const V n = shifted - splat<V>(kRound);
  const V r = fused(n, splat<V>(kLow), fused(n, splat<V>(kHigh), x));
  V p = splat<V>(kPolynomial[0]);
#pragma GCC unroll 4
  for (int k = 1; k < 5; ++k) p = fused(p, r, splat<V>(kPolynomial[k]));
  const V y = fused(r, p, splat<V>(1)) * Lanes<V>::from_bits(Lanes<V>::bits(shifted) << 23);
  return x < splat<V>(-87) ? zero<V>() : y;
}

template <class V>
struct VectorFunctions {
  static MRU_INLINE V exp_of_minus_abs(V x) {
    const V exponent = Lanes<V>::from_bits(Lanes<V>::bits(x) | Lanes<V>::bits(splat<V>(-0.0f)));
    if constexpr (sizeof(typename Lanes<V>::Scalar) == 4) return exp_of_float(exponent);
    else return exponential(exponent);
  }
  static MRU_INLINE V log(V x) { return logarithm(x); }
  static MRU_INLINE V log1p(V x) { return logarithm_of_1_plus(x); }
  static MRU_INLINE V multiply_add(V a, V b, V c) { return fused(a, b, c); }
  static MRU_INLINE auto has_sign(V x) { return Lanes<V>::bits(x) < 0; }
};
template <>
struct Functions<Vector<float, kVectorBytes / 4>> : VectorFunctions<Vector<float, kVectorBytes / 4>> {};
template <>
struct Functions<Vector<double, kVectorBytes / 8>> : VectorFunctions<Vector<double, kVectorBytes / 8>> {};

}  // namespace mru::softmax
