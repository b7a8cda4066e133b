// Functions of vectors, for the CPU kernels of cells that mru_kernels.define_cell prints. A NaN gives NaN. The exponential is
// our own; what follows from it differs from the C library by a few units in the last place. Others are the C library's, lane
// by lane.
#pragma once
#include "cpu/kernels/vector.h"

namespace mru {

#define MRU_EACH_LANE(name, of_float, of_double)                    \
  template <class V>                                                \
  MRU_INLINE V name(V x) {                                          \
    return Lanes<V>::each(x, [](auto a) {                           \
      if constexpr (sizeof(a) == sizeof(float)) return of_float(a); \
      else return of_double(a);                                     \
    });                                                             \
  }
MRU_EACH_LANE(exponential_minus_1, __builtin_expm1f, __builtin_expm1)
MRU_EACH_LANE(logarithm, __builtin_logf, __builtin_log)
MRU_EACH_LANE(logarithm_of_1_plus, __builtin_log1pf, __builtin_log1p)
MRU_EACH_LANE(sine, __builtin_sinf, __builtin_sin)
MRU_EACH_LANE(cosine, __builtin_cosf, __builtin_cos)
MRU_EACH_LANE(error_function, __builtin_erff, __builtin_erf)
MRU_EACH_LANE(square_root, __builtin_sqrtf, __builtin_sqrt)
#undef MRU_EACH_LANE

template <class V>
MRU_INLINE V power(V x, V y) {
  int i = 0;
  return Lanes<V>::each(x, [&](auto a) {
    if constexpr (sizeof(a) == sizeof(float)) return __builtin_powf(a, y[i++]);
    else return __builtin_pow(a, y[i++]);
  });
}
template <class V>
MRU_INLINE V maximum(V x, V y) {
  return (x > y) | (x != x) ? x : y;
}
template <class V>
MRU_INLINE V minimum(V x, V y) {
  return (x < y) | (x != x) ? x : y;
}

// e^x = 2^n e^r with |r| <= ln(2) / 2: e^r by its Taylor series, 2^n by the bits of two exponents, so that subnormal results
// are right too.
template <class V>
MRU_INLINE V exponential(V x) {
  using S = typename Lanes<V>::Scalar;
  using Int = typename Lanes<V>::Int;
  constexpr bool kDouble = sizeof(S) == sizeof(double);
  constexpr int kMantissa = kDouble ? 52 : 23, kBias = kDouble ? 1023 : 127, kTerms = kDouble ? 13 : 7;
  constexpr S kMost = kDouble ? 710 : 89, kLeast = kDouble ? -746 : -104;
  // ln(2) in two parts; n times the first is exact.
  constexpr S kHigh = kDouble ? 0x1.62e4p-1 : 0x1.63p-1;
  constexpr S kLow = kDouble ? 0x1.7f7d1cf79abcap-20 : S(-0x1.bd0105c610ca8p-13);
  constexpr S kRound = kDouble ? 0x1.8p52 : S(0x1.8p23);  // adding it rounds to an integer, in the lowest bits

  const V limited = x > splat<V>(kMost) ? splat<V>(kMost) : x < splat<V>(kLeast) ? splat<V>(kLeast) : x;
  const V shifted = limited * splat<V>(S(1.4426950408889634074)) + splat<V>(kRound);
  const V n = shifted - splat<V>(kRound);
  const V r = (limited - n * splat<V>(kHigh)) - n * splat<V>(kLow);
  V sum = splat<V>(S(1) / kTerms);
  // Horner's rule of 1 + r (1 + r / 2 (1 + r / 3 (...)))
  sum = splat<V>(1) + r * sum;
#pragma GCC unroll 16
  for (int k = kTerms - 1; k > 0; --k) sum = splat<V>(1) + r * splat<V>(S(1) / k) * sum;
  const Int whole = Lanes<V>::bits(shifted) - Lanes<V>::bits(splat<V>(kRound)), half = whole >> 1;
  const auto power_of_2 = [](Int e) { return Lanes<V>::from_bits((e + kBias) << kMantissa); };
  return sum * power_of_2(half) * power_of_2(whole - half);
}

template <class V>
MRU_INLINE V sigmoid(V x) {
  return splat<V>(1) / (splat<V>(1) + exponential(-x));
}

}  // namespace mru
