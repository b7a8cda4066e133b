// What a cell's formulas need of the type they run on. Cells are templates over a value type V: a scalar (CUDA) or a
// vector of lanes (CPU). `mask ? a : b`, `!` and `&&` mean the same for both, so only what C++ does not spell alike for
// both stands here; csrc/cpu/vector.h specialises it for vectors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

#ifdef __CUDACC__
#define MRU_INLINE __host__ __device__ __forceinline__
#else
#define MRU_INLINE inline __attribute__((always_inline))
#endif

namespace mru {

// A complex number, or a vector of them: V is its scalar type or vector of lanes.
template <class V>
struct Complex {
  V re, im;

  Complex() = default;
  MRU_INLINE constexpr Complex(V re, V im = V{}) : re(re), im(im) {}

  friend MRU_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
  friend MRU_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
  friend MRU_INLINE Complex operator*(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  }
  friend MRU_INLINE Complex operator*(V a, Complex b) { return {a * b.re, a * b.im}; }
  MRU_INLINE Complex& operator+=(Complex b) { return *this = *this + b; }
  friend MRU_INLINE bool operator==(Complex a, Complex b) { return a.re == b.re && a.im == b.im; }
};

template <class V>
MRU_INLINE V conj(V x) {
  return x;
}
template <class V>
MRU_INLINE Complex<V> conj(Complex<V> x) {
  return {x.re, -x.im};
}
template <class V>
MRU_INLINE V real(V x) {
  return x;
}
template <class V>
MRU_INLINE V real(Complex<V> x) {
  return x.re;
}

// The real type of a type that may be complex.
template <class V>
struct RealOf {
  using type = V;
  static constexpr bool is_complex = false;
};
template <class V>
struct RealOf<Complex<V>> {
  using type = V;
  static constexpr bool is_complex = true;
};

template <class V>
struct Lanes {
  using Scalar = V;
  using Int = int;
  static MRU_INLINE V splat(Scalar a) { return a; }
  static MRU_INLINE V abs(V x) { return std::fabs(x); }
  static MRU_INLINE V turned(V v, V x) {
#ifdef __CUDA_ARCH__  // which compares and selects at half the rate of other instructions
    if constexpr (sizeof(V) == 4) return with_sign(v, x + V(0));
#endif
    return x < 0 ? -v : v;
  }
  static MRU_INLINE V signed_as(V v, V x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(V) == 4) return with_sign(x == 0 ? 0 : v, x);
#endif
    return x == 0 ? 0 : turned(v, x);
  }

#ifdef __CUDA_ARCH__
 private:
  // -v where x has a sign, else v. In PTX, as one instruction.
  static __device__ __forceinline__ float with_sign(float v, float x) {
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, 0x80000000, 0x78;" : "=r"(bits) : "r"(__float_as_uint(v)), "r"(__float_as_uint(x)));
    return __uint_as_float(bits);
  }
#endif
};

template <class V>
MRU_INLINE V splat(typename Lanes<V>::Scalar a) {
  return Lanes<V>::splat(a);
}

// v sgn(x): -v where x < 0, else v.
template <class V>
MRU_INLINE V turned(V v, V x) {
  return Lanes<V>::turned(v, x);
}
// v sign(x), where sign(0) = 0: what |x| passes of a gradient.
template <class V>
MRU_INLINE V signed_as(V v, V x) {
  return Lanes<V>::signed_as(v, x);
}

// For gradients, which no rule wants exact: a b + c and 1 / x, as a device does them in one instruction.
template <class V>
MRU_INLINE V multiply_add(V a, V b, V c) {
#ifdef __CUDA_ARCH__
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}
template <class V>
MRU_INLINE V reciprocal(V x) {
  return splat<V>(1) / x;
}
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#endif

// A sum of any number of terms to about the last place. `lost` is what the additions rounded away (two-sum); NaN once `sum`
// is infinite or NaN. Terms may themselves be sums of up to kSummed terms, which a loop adds plainly.
constexpr int kSummed = 32;
template <class V>
struct Sum {
  V sum{}, lost{};

  MRU_INLINE void add(V term) {
    const V next = sum + term, added = next - sum;
    lost += (sum - (next - added)) + (term - added);
    sum = next;
  }
  MRU_INLINE V total() const { return total_of(sum, lost); }

 private:
  template <class R>
  static MRU_INLINE R total_of(R sum, R lost) {
    return lost == lost ? sum + lost : sum;
  }
  template <class R>
  static MRU_INLINE Complex<R> total_of(Complex<R> sum, Complex<R> lost) {
    return {total_of(sum.re, lost.re), total_of(sum.im, lost.im)};
  }
};

// The surrogate derivative of the unit step H, k / (1 + (pi k x)^2), in a form that is right for any finite k > 0:
//
//   gain / (tie + (bend x)^2)     tie = gain / k     bend = pi sqrt(k gain)     gain: a power of two
//
// `gain` is 1 where k and 1 / k are well within the range of S. Elsewhere it keeps `tie`, 1 / tie and `bend` normal numbers,
// which a processor that flushes subnormals needs. Slopes below gain / 2^126 in float32 may become 0. In float32, k beyond
// [2^-248, 2^186] counts as the nearest value in it, which gives 0 and infinity as k does, unless 0 < |x| < 2^-33.
template <class S>
struct Surrogate {
  S gain = 1, tie = 1, bend = 1;

  Surrogate() = default;
  MRU_INLINE explicit Surrogate(double k) {
    constexpr int kMost = std::numeric_limits<S>::max_exponent - 4;  // the exponent of k from which on gain is not 1
    const double least = std::ldexp(1.0, std::numeric_limits<S>::min_exponent - 1);  // normal number
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
