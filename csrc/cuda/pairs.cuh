// Two 16-bit elements in one register, with what a bistable cell needs to decide: it compares magnitudes as integers,
// flips signs and selects bits. That takes half the instructions of single elements and rounds nothing. A cell runs on
// a Pair as on a float, but its comparisons do not see NaN: `squares` finds them.
#pragma once
#include "memory.cuh"

namespace mru::cuda {

template <class T>
struct Pair {
  uint32_t bits;  // the first in the low half
};
struct Magnitudes {
  uint32_t bits;
};
struct PairMask {
  uint32_t bits;  // the sign bit of each half is its value
};
__device__ __forceinline__ PairMask operator|(PairMask a, PairMask b) { return {a.bits | b.bits}; }
constexpr uint32_t kSigns = 0x80008000u;

// The sign bit that is set in each half of `a` stays unless the difference borrows from it.
__device__ __forceinline__ PairMask operator>=(Magnitudes a, Magnitudes b) { return {(a.bits | kSigns) - b.bits}; }

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t fused(Pair<BFloat16> a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a.bits), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t fused(Pair<Float16> a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a.bits), "r"(b), "r"(c));
  return d;
}
// Fills each half with its sign bit.
__device__ __forceinline__ uint32_t whole(PairMask mask) {
  uint32_t d;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(d) : "r"(mask.bits));
  return d;
}

#else

template <class T>
uint32_t fused(Pair<T> a, uint32_t b, uint32_t c) {
  const auto half = [](uint32_t x, int i) { return widen(T{uint16_t(x >> 16 * i)}); };
  return narrow_pair(T{}, half(a.bits, 0) * half(b, 0) + half(c, 0), half(a.bits, 1) * half(b, 1) + half(c, 1));
}
inline uint32_t whole(PairMask mask) { return (mask.bits >> 15 & 0x00010001u) * 0xffffu; }

#endif

// What the kernels themselves do with a Pair as with a single value; what cells do is in Lanes, below.

template <class V>
constexpr int kElements = 1;
template <class T>
constexpr int kElements<Pair<T>> = 2;

template <class T>
__device__ __forceinline__ float lane(Pair<T> x, int i) {
  return widen(bits_as<Vector<T, 2>>(x), i);
}
template <class S>
__device__ __forceinline__ S lane(S x, int) {
  return x;
}

// x^2 + sum, which is NaN if and only if x or sum is.
template <class T>
__device__ __forceinline__ Pair<T> squares(Pair<T> x, Pair<T> sum) {
  return {fused(x, x.bits, sum.bits)};
}
template <class S>
__device__ __forceinline__ S squares(S x, S sum) {
  return multiply_add(x, x, sum);
}
template <class T>
__device__ __forceinline__ Pair<T> select(PairMask mask, Pair<T> a, Pair<T> b) {
  const uint32_t bits = whole(mask);
  return {(a.bits & bits) | (b.bits & ~bits)};
}
template <class S>
__device__ __forceinline__ S select(bool mask, S a, S b) {
  return mask ? a : b;
}

}  // namespace mru::cuda

namespace mru {

template <class T>
struct Lanes<cuda::Pair<T>> {
  using V = cuda::Pair<T>;
  using Scalar = float;
  static MRU_INLINE V splat(float x) { return {cuda::narrow_pair(T{}, x, x)}; }
  static MRU_INLINE cuda::Magnitudes abs(V x) { return {x.bits & ~cuda::kSigns}; }
  static MRU_INLINE V flip_sign(V v, V x) {
    const uint32_t plus_zero = fused(x, splat(1).bits, 0);  // x, but +0 for both zeros
    return {v.bits ^ (plus_zero & cuda::kSigns)};
  }
};

}  // namespace mru
