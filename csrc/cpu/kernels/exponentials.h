// Exponentials of vectors, with the same bits on every instruction set. Errors that were measured, in units in the last place,
// are at most 1.1 for e^x, 1.9 (2.1 in float64) for e^x - 1 and 2.6 for tanh. A NaN gives NaN.
#pragma once

namespace mru {

// Base: lanes with arithmetic, abs and bits; see vector.h.
template <class Base>
struct WithExponentials : Base {
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

 private:
  static constexpr S kRound = sizeof(S) == 8 ? 0x1.8p52 : S(0x1.8p23);  // adding it rounds to an integer

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

  static constexpr double factorial(int k) { return k < 2 ? 1 : k * factorial(k - 1); }
  // 1 / k! + r / (k + 1)! + ..., kTerms terms from k = kFirst on. powers: r, r^2, r^4, ... Few operations wait for each other.
  template <int kFirst, int kTerms>
  static MRU_INLINE V taylor(const V* powers) {
    if constexpr (kTerms == 1) {
      constexpr S kCoefficient = S(1 / factorial(kFirst));
      return splat(kCoefficient);
    } else {
      constexpr int kLevel = 31 - __builtin_clz(kTerms - 1), kLow = 1 << kLevel;
      return taylor<kFirst, kLow>(powers) + powers[kLevel] * taylor<kFirst + kLow, kTerms - kLow>(powers);
    }
  }

  // e^x = 2^n (1 + p) with 1 + p = e^r, |r| <= ln(2) / 2. x is limited to a range outside of which e^x is 0 or infinite.
  struct Reduced {
    V p, n, shifted;  // the lowest bits of shifted = n + kRound are those of n
  };
  static MRU_INLINE Reduced reduce(V x) {
    constexpr bool kDouble = sizeof(S) == sizeof(double);
    constexpr S kMost = kDouble ? 710 : 89, kLeast = kDouble ? -746 : -104;
    // ln(2) in two parts; n times the first is exact.
    constexpr S kHigh = kDouble ? 0x1.62e4p-1 : 0x1.63p-1;
    constexpr S kLow = kDouble ? 0x1.7f7d1cf79abcap-20 : S(-0x1.bd0105c610ca8p-13);
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
    constexpr int kMantissa = sizeof(S) == 8 ? 52 : 23, kBias = sizeof(S) == 8 ? 1023 : 127;
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
