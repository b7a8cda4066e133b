// What a cell's formulas need of the type they run on. Cells are templates over a value type V: a scalar (CUDA,
// tails) or a vector of lanes (CPU). `mask ? a : b`, `!` and `&&` mean the same for both, so only what C++ does
// not spell alike for both stands here; csrc/cpu/vector.h specialises it for vectors.
#pragma once

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
  static MRU_INLINE V abs(V x) { return x < V(0) ? -x : x; }
};

template <class V>
MRU_INLINE V splat(typename Lanes<V>::Scalar a) {
  return Lanes<V>::splat(a);
}

// The ordinary sign, with sign(0) = 0: the derivative of |x|.
template <class V>
MRU_INLINE V sign0(V x) {
  const V zero = splat<V>(0), one = splat<V>(1);
  return x > zero ? one : (x < zero ? -one : zero);
}

// Derivative of the unit step H in the backward pass: k / (1 + (pi k x)^2). That of sgn is twice this.
template <class V, class S>
MRU_INLINE V step_slope(V x, S k) {
  const V y = x * splat<V>(S(3.14159265358979323846) * k);
  return splat<V>(k) / (splat<V>(1) + y * y);
}

}  // namespace mru
