// The functions of step.h for vectors of lanes. The same bits on every instruction set: there are no fused operations.
#pragma once
#include "../../functions.h"
#include "../step.h"

namespace mru::softmax {

// e^x for x <= 0, within 1 unit in the last place; below e^-87 it is 0. Cody and Waite's reduction to |r| <= ln(2) / 2, and
// 1 + r + r^2 p(r) with the p of least relative error.
template <class V>
MRU_INLINE V exp_of_float(V x) {
  constexpr float kPolynomial[] = {0x1.6a23cep-10f, 0x1.123a2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f};
  constexpr float kHigh = 0x1.63p-1f, kLow = -0x1.bd0106p-13f;  // ln(2); n times the first is exact
  constexpr float kRound = 0x1.8p23f;                           // adding it rounds to an integer, in the lowest bits
  const V shifted = x * splat<V>(1.44269504f) + splat<V>(kRound);
  const V n = shifted - splat<V>(kRound);
  const V r = (x - n * splat<V>(kHigh)) - n * splat<V>(kLow);
  V p = splat<V>(kPolynomial[0]);
#pragma GCC unroll 4
  for (int k = 1; k < 5; ++k) p = p * r + splat<V>(kPolynomial[k]);
  const V y = splat<V>(1) + (r + (r * r) * p);
  const auto exponent = (Lanes<V>::bits(shifted) - Lanes<V>::bits(splat<V>(kRound)) + 127) << 23;
  return x < splat<V>(-87) ? zero<V>() : y * Lanes<V>::from_bits(exponent);
}

// log(x) for x >= 1 or x = 0: 2 artanh((m - 1) / (m + 1)) + k log(2), with x = 2^k m and m in [1 / sqrt(2), sqrt(2)).
template <class V>
MRU_INLINE V log_of(V x) {
  using S = typename Lanes<V>::Scalar;
  constexpr bool kDouble = sizeof(S) == sizeof(double);
  constexpr int kMantissa = kDouble ? 52 : 23, kTerms = kDouble ? 11 : 5;
  constexpr S kHigh = kDouble ? 0x1.62e4p-1 : 0x1.63p-1;
  constexpr S kLow = kDouble ? 0x1.7f7d1cf79abcap-20 : S(-0x1.bd0105c610ca8p-13);
  const auto k = (Lanes<V>::bits(x) - Lanes<V>::bits(splat<V>(S(0.70710678118654752)))) >> kMantissa;
  const V m = Lanes<V>::from_bits(Lanes<V>::bits(x) - (k << kMantissa)), n = __builtin_convertvector(k, V);
  const V f = (m - splat<V>(1)) / (m + splat<V>(1)), square = f * f;
  V sum = splat<V>(S(1) / (2 * kTerms - 1));
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) sum = sum * square + splat<V>(S(1) / (2 * i + 1));
  const V log = (f + f) * sum + n * splat<V>(kLow) + n * splat<V>(kHigh);
  return x == zero<V>() ? splat<V>(-kInfinity<V>) : x == x ? log : x;
}

template <class V>
struct VectorFunctions {
  static MRU_INLINE V exp(V x) {
    if constexpr (sizeof(typename Lanes<V>::Scalar) == 4) return exp_of_float(x);
    else return exponential(x);
  }
  static MRU_INLINE V log(V x) { return log_of(x); }
  static MRU_INLINE V log1p(V x) { return logarithm_of_1_plus(x); }
  static MRU_INLINE auto has_sign(V x) { return Lanes<V>::bits(x) < 0; }
};
template <>
struct Functions<Vector<float, kVectorBytes / 4>> : VectorFunctions<Vector<float, kVectorBytes / 4>> {};
template <>
struct Functions<Vector<double, kVectorBytes / 8>> : VectorFunctions<Vector<double, kVectorBytes / 8>> {};

}  // namespace mru::softmax
