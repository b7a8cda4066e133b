// Elementary functions of vectors, with the same bits on every instruction set. Errors that were measured, in units in the last
// place, are at most 1.1 for e^x, 1.9 (2.1 in float64) for e^x - 1, 2.6 for tanh, 0.9 for log(x) and 2.5 for log(1 + x). A NaN
// gives NaN.
#pragma once
#include <limits>

namespace mru {

// Base: lanes with arithmetic, abs and bits; see vector.h.
template <class Base>
struct WithElementary : Base {
  using typename Base::Int;
  using typename Base::V;
  using S = typename Base::Scalar;
  using Base::abs, Base::bits, Base::from_bits, Base::splat;

  static MRU_INLINE V exp(V x) {
    const Reduced e = reduce(x);
    return scaled(splat(1) + e.p, e);
  }
  static MRU_INLINE V expm1(V x) {
    const Reduced e = reduce(x);
    return with_sign(e.n > splat(60) ? scaled(splat(1) + e.p, e) : minus_1(e), x);  // 2^n alone may be infinite
  }
  static MRU_INLINE V tanh(V x) {  // (1 - e) / (1 + e), e = e^(-2 |x|)
    const V e_minus_1 = minus_1(reduce(splat(-2) * abs(x)));
    return with_sign(e_minus_1 / (splat(2) + e_minus_1), x);
  }
  // x = 2^n (1 + f) with 1 + f in [1 / sqrt(2), sqrt(2)). A subnormal x is scaled first.
  static MRU_INLINE V log(V x) {
    constexpr S kScale = kDouble ? 0x1p54 : 0x1p25;
    const V size = abs(x);  // no difference of bits overflows
    const auto small = size < splat(std::numeric_limits<S>::min());
    const V scaled = small ? size * splat(kScale) : size;
    const Int k = (bits(scaled) - bits(splat(S(0.70710678118654752)))) >> kMantissa;
    const V f = from_bits(bits(scaled) - (k << kMantissa)) - splat(1);
    const V n = from_bits(bits(splat(kRound)) + k) - splat(kRound);
    const V log = log_of_1_plus(f, small ? n - splat(kDouble ? 54 : 25) : n);
    const V special = x == V{} ? splat(-kInfinity) : x < V{} ? splat(kNaN) : x;  // infinity and NaN stay
    return (x > V{}) & (x < splat(kInfinity)) ? log : special;
  }
  // log(u) x / (u - 1) with u = 1 + x: the rounding error of u cancels.
  static MRU_INLINE V log1p(V x) {
    const V u = splat(1) + x, u_minus_1 = u - splat(1), log_u = log(u);
    return u_minus_1 == V{} ? x : u < splat(kInfinity) ? log_u * (x / u_minus_1) : u;
  }
  static MRU_INLINE V sqrt(V x) {
#if defined(__AVX512F__)
    if constexpr (kDouble) return (V)_mm512_sqrt_pd((__m512d)x);
    else return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
    if constexpr (kDouble) return (V)_mm256_sqrt_pd((__m256d)x);
    else return (V)_mm256_sqrt_ps((__m256)x);
#else
    return Base::each(x, [](S a) { return kDouble ? S(__builtin_sqrt(a)) : S(__builtin_sqrtf(a)); });
#endif
  }

 private:
  static constexpr bool kDouble = sizeof(S) == sizeof(double);
  static constexpr int kMantissa = kDouble ? 52 : 23;
  static constexpr S kRound = kDouble ? 0x1.8p52 : S(0x1.8p23);  // adding it rounds to an integer
  // ln(2) in two parts. The first times the exponent of a number is exact.
  static constexpr S kHigh = kDouble ? 0x1.62e4p-1 : 0x1.63p-1;
  static constexpr S kLow = kDouble ? 0x1.7f7d1cf79abcap-20 : S(-0x1.bd0105c610ca8p-13);

  static constexpr S kInfinity = std::numeric_limits<S>::infinity(), kNaN = std::numeric_limits<S>::quiet_NaN();

  static MRU_INLINE V with_sign(V size, V x) { return from_bits(bits(abs(size)) | (bits(x) & Base::kSign)); }

  // a < b ? a : b and a > b ? a : b, so b where one is a NaN. GCC 12 compares and blends where AVX-512 has one instruction.
  static MRU_INLINE V smaller(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return (V)_mm512_min_ps((__m512)a, (__m512)b);
    else return (V)_mm512_min_pd((__m512d)a, (__m512d)b);
#else
    return a < b ? a : b;
#endif
  }
  static MRU_INLINE V larger(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return (V)_mm512_max_ps((__m512)a, (__m512)b);
    else return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
    return a > b ? a : b;
#endif
  }

  // log(1 + f) + n log(2). The first is 2 artanh(s) = f - (h - s (h + q)) with s = f / (2 + f), h = f^2 / 2 and
  // q = 2 s^2 / 3 + 2 s^4 / 5 + ...
  static MRU_INLINE V log_of_1_plus(V f, V n) {
    constexpr int kTerms = kDouble ? 10 : 4;
    const V s = f / (splat(2) + f), s2 = s * s, h = splat(0.5) * f * f;
    V q = splat(S(2.0 / (2 * kTerms + 1)));
#pragma GCC unroll 16
    for (int i = kTerms - 1; i > 0; --i) q = q * s2 + splat(S(2.0 / (2 * i + 1)));
    return n * splat(kHigh) - ((h - (s * (h + q * s2) + n * splat(kLow))) - f);
  }

  static constexpr double factorial(int k) { return k < 2 ? 1 : k * factorial(k - 1); }
  // 1 / k! + r / (k + 1)! + ..., kTerms terms from k = kFirst on. powers: r, r^2, r^4, ... Few operations wait for each other.
  template <int kFirst, int kTerms>
  static MRU_INLINE V taylor(const V* powers) {
    if constexpr (kTerms == 1) {
      constexpr S kCoefficient = S(1 / factorial(kFirst));
      return splat(kCoefficient);
    } else {
      constexpr int kLevel = 31 - __builtin_clz(kTerms - 1), kFront = 1 << kLevel;
      return taylor<kFirst, kFront>(powers) + powers[kLevel] * taylor<kFirst + kFront, kTerms - kFront>(powers);
    }
  }

  // e^x = 2^n (1 + p) with 1 + p = e^r and |r| <= ln(2) / 2. Beyond the limits that x gets, e^x is 0 or infinite.
  struct Reduced {
    V p, n, shifted;  // the lowest bits of shifted = n + kRound are those of n
  };
  static MRU_INLINE Reduced reduce(V x) {
    constexpr S kMost = kDouble ? 710 : 89, kLeast = kDouble ? -746 : -104;
    const V limited = smaller(splat(kMost), larger(splat(kLeast), x));
    const V shifted = limited * splat(S(1.4426950408889634074)) + splat(kRound), n = shifted - splat(kRound);
    const V r = (limited - n * splat(kHigh)) - n * splat(kLow), r2 = r * r, r4 = r2 * r2;
    const V powers[] = {r, r2, r4, r4 * r4};
    return {r + r2 * taylor<2, kDouble ? 12 : 6>(powers), n, shifted};
  }
  // y 2^n.
  static MRU_INLINE V scaled(V y, const Reduced& e) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return (V)_mm512_scalef_ps((__m512)y, (__m512)e.n);
    else return (V)_mm512_scalef_pd((__m512d)y, (__m512d)e.n);
#else
    constexpr int kBias = kDouble ? 1023 : 127;
    const Int whole = bits(e.shifted) - bits(splat(kRound)), half = whole >> 1;  // 2^whole need not be a normal number
    const auto power_of_2 = [](Int n) { return from_bits((n + kBias) << kMantissa); };
    return y * power_of_2(half) * power_of_2(whole - half);
#endif
  }
  // e^x - 1, for n below where 2^n is infinite.
  static MRU_INLINE V minus_1(const Reduced& e) {
    const V scale = scaled(splat(1), e);
    return scale * e.p + (scale - splat(1));
  }
};

}  // namespace mru
