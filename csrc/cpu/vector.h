// Lanes of the CPU kernels: GCC/Clang vector types as wide as the instruction set that this file is compiled for,
// and loads and stores that convert between a stream's element type and the state type.
// Included once per instruction set, inside its own namespace (see kernels.cpp): no standard library in here.
#pragma once
#include <stdint.h>

#include <limits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../cells/lanes.h"

namespace mru {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class S, int N>
struct VectorOf {
  typedef S type __attribute__((vector_size(sizeof(S) * N)));
};
template <class S>
struct VectorOf<S, 1> {
  typedef S type;
};
template <class S, int N>
using Vector = typename VectorOf<S, N>::type;
template <class S, int N>
struct VectorOf<Complex<S>, N> {
  using type = Complex<Vector<S, N>>;
};
template <class S>
struct VectorOf<Complex<S>, 1> {
  using type = Complex<S>;
};

template <class S, class I, int N>
struct VectorLanes {
  using Scalar = S;
  using Int = Vector<I, N>;
  using V = Vector<S, N>;
  static MRU_INLINE V splat(S a) { return a - V{}; }
  static MRU_INLINE V abs(V x) { return (V)((Int)x & ~kSign); }
  static MRU_INLINE V flip(V v, V x) { return (V)((Int)v ^ ((Int)x & kSign)); }

 private:
  static constexpr I kSign = std::numeric_limits<I>::min();
};
template <class V>
struct Lanes<Complex<V>> {
  using Int = typename Lanes<V>::Int;
};
template <>
struct Lanes<Vector<float, kVectorBytes / 4>> : VectorLanes<float, int32_t, kVectorBytes / 4> {};
template <>
struct Lanes<Vector<double, kVectorBytes / 8>> : VectorLanes<double, int64_t, kVectorBytes / 8> {};

// The integers from 0 to N - 1, as what a fold expression goes over.
template <int... i>
struct Indices {};
template <int N, int... i>
struct Count : Count<N - 1, N - 1, i...> {};
template <int... i>
struct Count<0, i...> {
  using type = Indices<i...>;
};

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};
template <class S>
struct StateOf<Complex<S>> {
  using type = Complex<S>;
};

template <class To, class From>
MRU_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}
template <class V>
MRU_INLINE V load_bytes(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// Conversions on N lanes of raw 16-bit patterns, N = 1 included: `U` holds them widened to 32 bits.
template <int N, class T>
struct Half;

template <int N>
struct Half<N, BFloat16> {
  using F = Vector<float, N>;
  using U = Vector<uint32_t, N>;
  static MRU_INLINE F widen(U bits) { return bit_cast<F>(bits << 16); }
  static MRU_INLINE U narrow(F x) {  // round to nearest even; NaN keeps its sign and becomes quiet
    const U u = bit_cast<U>(x);
    const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return x != x ? (u >> 16) | 0x40u : rounded;
  }
};

template <int N>
struct Half<N, Float16> {
  using F = Vector<float, N>;
  using U = Vector<uint32_t, N>;
  // Scaling by powers of two does the subnormals; infinities and NaN are mended after.
  static MRU_INLINE F widen(U bits) {
    const U magnitude = (bits & 0x7fffu) << 13;
    const F scaled = bit_cast<F>(magnitude) * 0x1p112f;
    const U u = bit_cast<U>(scaled) | ((bits & 0x7c00u) == 0x7c00u ? U{} + 0x7f800000u : U{});
    return bit_cast<F>(u | ((bits & 0x8000u) << 16));
  }
  static MRU_INLINE U narrow(F x) {
    const U u = bit_cast<U>(x);
    const U sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // Normal results: rebias the exponent, add half of the last place kept (to even).
    const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: let the float adder round, at the place where a half's last bit lies.
    const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
    U half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? U{} + 0x7c00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? U{} + 0x7e00u : half;
    return half | sign;
  }
};

template <int N>
MRU_INLINE Vector<uint32_t, N> widen_bits(const void* p) {
  if constexpr (N == 1) return *static_cast<const uint16_t*>(p);
#if defined(__AVX512F__)
  else return (Vector<uint32_t, N>)_mm512_cvtepu16_epi32(load_bytes<__m256i>(p));
#elif defined(__AVX2__)
  else return (Vector<uint32_t, N>)_mm256_cvtepu16_epi32(load_bytes<__m128i>(p));
#else
  else return __builtin_convertvector(load_bytes<Vector<uint16_t, N>>(p), Vector<uint32_t, N>);
#endif
}
template <int N>
MRU_INLINE void narrow_bits(void* p, Vector<uint32_t, N> u) {
#if defined(__AVX512F__)
  if constexpr (N > 1) {
    const __m256i packed = _mm512_cvtepi32_epi16((__m512i)u);
    __builtin_memcpy(p, &packed, sizeof packed);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (N > 1) {
    const __m256i wide = (__m256i)u;
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    __builtin_memcpy(p, &packed, sizeof packed);
    return;
  }
#endif
  if constexpr (N == 1) {
    *static_cast<uint16_t*>(p) = uint16_t(u);
  } else {
    const auto packed = __builtin_convertvector(u, Vector<uint16_t, N>);
    __builtin_memcpy(p, &packed, sizeof packed);
  }
}

// The even elements, or the odd ones, of two vectors side by side.
template <int kFirst, int N, class V>
MRU_INLINE V every_other(V a, V b) {
  return [&]<int... i>(Indices<i...>) {
    return __builtin_shufflevector(a, b, (2 * i + kFirst)...);
  }(typename Count<N>::type{});
}
// Elements of two vectors in turn, from the kFirst-th of each on.
template <int kFirst, int N, class V>
MRU_INLINE V in_turn(V a, V b) {
  return [&]<int... i>(Indices<i...>) {
    return __builtin_shufflevector(a, b, (kFirst + i / 2 + i % 2 * N)...);
  }(typename Count<N>::type{});
}

template <int N, class S>
MRU_INLINE Vector<Complex<S>, N> load_complex(const Complex<S>* p) {
  const auto low = load_bytes<Vector<S, N>>(p), high = load_bytes<Vector<S, N>>(p + N / 2);
  return {every_other<0, N>(low, high), every_other<1, N>(low, high)};
}
template <int N, class S>
MRU_INLINE void store_complex(Complex<S>* p, Vector<Complex<S>, N> v) {
  const Vector<S, N> parts[2] = {in_turn<0, N>(v.re, v.im), in_turn<N / 2, N>(v.re, v.im)};
  __builtin_memcpy(p, parts, sizeof parts);
}

// N consecutive elements at p, as state values.
template <int N, class T>
MRU_INLINE auto load(const T* p) {
  using S = typename StateOf<T>::type;
  if constexpr (N > 1 && RealOf<T>::is_complex) return load_complex<N>(p);
  else if constexpr (sizeof(T) == sizeof(S)) return load_bytes<Vector<S, N>>(p);
#if defined(__F16C__) && !defined(__AVX512F__)
  else if constexpr (N == 8 && __is_same(T, Float16)) return (Vector<S, N>)_mm256_cvtph_ps(load_bytes<__m128i>(p));
#endif
  else return Half<N, T>::widen(widen_bits<N>(p));
}

template <int N, class T>
MRU_INLINE void store(T* p, Vector<typename StateOf<T>::type, N> v) {
  if constexpr (N > 1 && RealOf<T>::is_complex) {
    store_complex<N>(p, v);
    return;
  } else if constexpr (sizeof(T) == sizeof(typename StateOf<T>::type)) {
    __builtin_memcpy(p, &v, sizeof v);
    return;
  }
#if defined(__F16C__) && !defined(__AVX512F__)
  else if constexpr (N == 8 && __is_same(T, Float16)) {
    const __m128i packed = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(p, &packed, sizeof packed);
    return;
  }
#endif
  else
    narrow_bits<N>(p, Half<N, T>::narrow(v));
}

}  // namespace mru
