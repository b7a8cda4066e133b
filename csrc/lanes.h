// Functions of the value types of cells. A cell is a template over V: a scalar (CUDA) or a vector of lanes (CPU). Operators
// and `mask ? a : b` work on both. This file has the functions that C++ spells differently for them;
// csrc/cpu/kernels/vector.h specialises Lanes for vectors.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MRU_INLINE __host__ __device__ __forceinline__
#else
#define MRU_INLINE inline __attribute__((always_inline))
#endif

namespace mru {

// A complex number, or a vector of complex numbers. V: the type of its real part.
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
  static MRU_INLINE V exp(V x) { return std::exp(x); }
  static MRU_INLINE V tanh(V x) { return std::tanh(x); }
  static MRU_INLINE V flip_sign(V v, V x) {
#ifdef __CUDA_ARCH__  // a GPU compares and selects at half the rate of other instructions
    if constexpr (sizeof(V) == 4) return with_sign(v, x + V(0));
#endif
    return x < 0 ? -v : v;
  }
  static MRU_INLINE V multiply_sign(V v, V x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(V) == 4) return with_sign(x == 0 ? 0 : v, x);
#endif
    return x == 0 ? 0 : flip_sign(v, x);
  }

#ifdef __CUDA_ARCH__
 private:
  // -v if the sign bit of x is set, else v, in one instruction.
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

template <class V>
MRU_INLINE V tanh(V x) {
  return Lanes<V>::tanh(x);
}

// v sgn(x): -v if x < 0, else v.
template <class V>
MRU_INLINE V flip_sign(V v, V x) {
  return Lanes<V>::flip_sign(v, x);
}
// v sign(x) with sign(0) = 0: v times the derivative of |x|.
template <class V>
MRU_INLINE V multiply_sign(V v, V x) {
  return Lanes<V>::multiply_sign(v, x);
}

// a b + c and 1 / x, rounded as is fastest on a device: for gradients, which need not be the same bits on every backend.
template <class V>
MRU_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
template <class V>
MRU_INLINE V reciprocal(V x) {
  return splat<V>(1) / x;
}
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#endif

}  // namespace mru
