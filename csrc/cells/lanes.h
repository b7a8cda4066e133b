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
