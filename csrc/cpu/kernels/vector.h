// Vector types of GCC and Clang, as wide as the instruction set that this file is compiled for, and loads and stores that
// convert between the element type of a stream and the state type. It does not use the standard library, whose inline
// functions one instruction set could link into another's code (see rows.h).
#pragma once
#include <stdint.h>

#include <limits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../../elements.h"
#include "elementary.h"

namespace mru {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int64_t kLine = 64;  // bytes of a line of the cache

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

// A full or a partial vector of N channels. In a partial one the first `count` lanes are valid; the others are loaded as 0 and
// not stored.
template <int N>
struct Full {
  static constexpr int kLanes = N;
  static constexpr bool kFull = true;
};
template <int N>
struct Partial {
  static constexpr int kLanes = N;
  static constexpr bool kFull = false;
  int count;
};

// A full vector that is stored by non-temporal stores, at a multiple of its size: they fill a line of the cache without reading
// it from memory first. Stores that fill the same line must follow each other. See `fence_stores` of cpu/plan.h.
template <int N>
struct NonTemporal : Full<N> {};

template <class S, class I, int N>
struct VectorLanes {
  using Scalar = S;
  using Int = Vector<I, N>;
  using V = Vector<S, N>;
  static MRU_INLINE V splat(S a) { return a - V{}; }
  static MRU_INLINE V abs(V x) { return (V)((Int)x & ~kSign); }
  static MRU_INLINE Int bits(V x) { return (Int)x; }
  static MRU_INLINE V from_bits(Int x) { return (V)x; }
  template <class F>
  static MRU_INLINE V each(V x, F f) {
    V y{};
    for (int i = 0; i < N; ++i) y[i] = f(x[i]);
    return y;
  }
  static MRU_INLINE V flip_sign(V v, V x) { return x < V{} ? -v : v; }
  static MRU_INLINE V multiply_sign(V v, V x) { return x == V{} ? V{} : (V)((Int)v ^ ((Int)x & kSign)); }

 protected:
  static constexpr I kSign = std::numeric_limits<I>::min();
};
template <class V>
struct Lanes<Complex<V>> {
  using Int = typename Lanes<V>::Int;
};
template <>
struct Lanes<Vector<float, kVectorBytes / 4>> : WithElementary<VectorLanes<float, int32_t, kVectorBytes / 4>> {};
template <>
struct Lanes<Vector<double, kVectorBytes / 8>> : WithElementary<VectorLanes<double, int64_t, kVectorBytes / 8>> {};

// The integers from 0 to N - 1 as a parameter pack.
template <int... i>
struct Indices {};
template <int N, int... i>
struct Count : Count<N - 1, N - 1, i...> {};
template <int... i>
struct Count<0, i...> {
  using type = Indices<i...>;
};

template <class To, class From>
MRU_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}

template <class V>
MRU_INLINE V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Loads and stores of N numbers without conversion.
template <class V, int N>
MRU_INLINE V load_raw(Full<N>, const void* p) {
  return load_as<V>(p);
}
template <class V, int N>
MRU_INLINE void store_raw(Full<N>, void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

#if defined(__SSE2__)
constexpr bool kHasNonTemporal = true;
template <class V, int N>
MRU_INLINE void store_raw(NonTemporal<N>, void* p, V v) {
  static_assert(sizeof v >= 16);
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
  if constexpr (sizeof v == 16) _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
}
#else
constexpr bool kHasNonTemporal = false;
#endif

#if defined(__AVX512F__)
template <class V, int N>
MRU_INLINE V load_raw(Partial<N> lanes, const void* p) {
  const unsigned mask = (1u << lanes.count) - 1;
  constexpr int kBytes = sizeof(V), kSize = kBytes / N;
  if constexpr (kBytes == 64 && kSize == 8) return (V)_mm512_maskz_loadu_epi64(mask, p);
  else if constexpr (kBytes == 64 && kSize == 4) return (V)_mm512_maskz_loadu_epi32(mask, p);
  else if constexpr (kBytes == 32 && kSize == 4) return (V)_mm256_maskz_loadu_epi32(mask, p);
  else if constexpr (kBytes == 32 && kSize == 2) return (V)_mm256_maskz_loadu_epi16(mask, p);
}
template <class V, int N>
MRU_INLINE void store_raw(Partial<N> lanes, void* p, V v) {
  const unsigned mask = (1u << lanes.count) - 1;
  constexpr int kBytes = sizeof(V), kSize = kBytes / N;
  if constexpr (kBytes == 64 && kSize == 8) _mm512_mask_storeu_epi64(p, mask, (__m512i)v);
  else if constexpr (kBytes == 64 && kSize == 4) _mm512_mask_storeu_epi32(p, mask, (__m512i)v);
  else if constexpr (kBytes == 32 && kSize == 4) _mm256_mask_storeu_epi32(p, mask, (__m256i)v);
  else if constexpr (kBytes == 32 && kSize == 2) _mm256_mask_storeu_epi16(p, mask, (__m256i)v);
  else static_assert(kBytes == 0);
}
#else
// The first `bytes` <= 8 bytes at p, an even number, and zeros. It uses integer registers, as a vector load that follows the
// stores of its parts waits until they have reached the cache.
MRU_INLINE uint64_t load_few_bytes(const char* p, int bytes) {
  const auto two = [](const char* at) { return uint64_t(load_as<uint16_t>(at)); };
  const auto four = [](const char* at) { return uint64_t(load_as<uint32_t>(at)); };
  if (bytes >= 4) return four(p) | four(p + bytes - 4) << 8 * (bytes - 4);
  return bytes >= 2 ? two(p) : 0;
}
// Copies `count` < 2 kMost elements of kSize bytes.
template <int kMost, int kSize>
MRU_INLINE void copy_few(char* to, const char* from, int count) {
  if (count & kMost) __builtin_memcpy(to, from, kMost * kSize), to += kMost * kSize, from += kMost * kSize;
  if constexpr (kMost > 1) copy_few<kMost / 2, kSize>(to, from, count);
}
#if defined(__AVX2__)
MRU_INLINE __m256i first_bytes(int bytes) {
  static const int32_t kOnes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnes + 8 - bytes / 4));
}
#endif
template <class V, int N>
MRU_INLINE V load_raw(Partial<N> lanes, const void* p) {
  const int bytes = lanes.count * int(sizeof(V) / N);
  const char* const from = static_cast<const char*>(p);
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    return (V)_mm256_maskload_epi32(reinterpret_cast<const int*>(from), first_bytes(bytes));
  } else
#endif
  {
    const uint64_t low = bytes < 8 ? load_few_bytes(from, bytes) : load_as<uint64_t>(from);
    if constexpr (sizeof(V) == 8) return bit_cast<V>(low);
    else return (V)Vector<uint64_t, 2>{low, bytes > 8 ? load_few_bytes(from + 8, bytes - 8) : 0};
  }
}
template <class V, int N>
MRU_INLINE void store_raw(Partial<N> lanes, void* p, V v) {
  constexpr int kSize = sizeof(V) / N;
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32)
    return _mm256_maskstore_epi32(static_cast<int*>(p), first_bytes(lanes.count * kSize), (__m256i)v);
#endif
  // Opaque: GCC 12 would narrow the computation of v to the stored part, and fails with an internal error.
  asm("" : "+m"(v));
  copy_few<N, kSize>(static_cast<char*>(p), reinterpret_cast<const char*>(&v), lanes.count);
}
#endif

// Conversions between float32 and 16-bit patterns in N lanes. `U`: the patterns, widened to 32 bits.
// Subnormals are converted as IEEE 754 says, even if the processor flushes subnormals to zero: a float16 subnormal is a normal
// float32 number, and the bits of a bfloat16 are copied. Arithmetic on float32 subnormals follows the processor's mode on
// every instruction set.
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
  static MRU_INLINE F widen(U bits) {
    const U magnitude = (bits & 0x7fffu) << 13, exponent = bits & 0x7c00u;
    const U rebiased = magnitude + (exponent == 0x7c00u ? U{} + (224u << 23) : U{} + (112u << 23));
    const F subnormal = bit_cast<F>(magnitude + (113u << 23)) - 0x1p-14f;  // 2^-14 (1 + m / 1024) - 2^-14: exact
    const U u = exponent == 0u ? bit_cast<U>(subnormal) : rebiased;
    return bit_cast<F>(u | ((bits & 0x8000u) << 16));
  }
  static MRU_INLINE U narrow(F x) {
    const U u = bit_cast<U>(x);
    const U sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // Normal results: rebias the exponent and round the last place to even.
    const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 rounds at the place of a half's last bit.
    const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
    U half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? U{} + 0x7c00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? U{} + 0x7e00u : half;
    return half | sign;
  }
};

template <int N>
MRU_INLINE Vector<uint32_t, N> widen_bits(Vector<uint16_t, N> narrow) {
#if defined(__AVX512F__)
  return (Vector<uint32_t, N>)_mm512_cvtepu16_epi32((__m256i)narrow);
#elif defined(__AVX2__)
  return (Vector<uint32_t, N>)_mm256_cvtepu16_epi32((__m128i)narrow);
#else
  return __builtin_convertvector(narrow, Vector<uint32_t, N>);
#endif
}
template <int N>
MRU_INLINE Vector<uint16_t, N> narrow_bits(Vector<uint32_t, N> u) {
#if defined(__AVX512F__)
  return (Vector<uint16_t, N>)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(__AVX2__)
  const __m256i wide = (__m256i)u;
  return (Vector<uint16_t, N>)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
  return __builtin_convertvector(u, Vector<uint16_t, N>);
#endif
}

// Elements kFirst, kFirst + 2, ... of a and b, concatenated.
template <int kFirst, int N, class V>
MRU_INLINE V every_other(V a, V b) {
  return [&]<int... i>(Indices<i...>) {
    return __builtin_shufflevector(a, b, (2 * i + kFirst)...);
  }(typename Count<N>::type{});
}
// Elements of a and b in turn, from element kFirst of each.
template <int kFirst, int N, class V>
MRU_INLINE V in_turn(V a, V b) {
  return [&]<int... i>(Indices<i...>) {
    return __builtin_shufflevector(a, b, (kFirst + i / 2 + i % 2 * N)...);
  }(typename Count<N>::type{});
}

// The lanes of half kHalf (0 or 1) of the 2 N real numbers that N complex numbers are.
template <int kHalf, int N>
MRU_INLINE Full<N> half(Full<N> lanes) {
  return lanes;
}
template <int kHalf, int N>
MRU_INLINE NonTemporal<N> half(NonTemporal<N> lanes) {
  return lanes;
}
template <int kHalf, int N>
MRU_INLINE Partial<N> half(Partial<N> lanes) {
  const int reals = 2 * lanes.count - kHalf * N;
  return {reals < 0 ? 0 : reals < N ? reals : N};
}

// The elements at p in the valid lanes, converted to the state type.
template <class L, class T>
MRU_INLINE auto load(L lanes, const T* p) {
  constexpr int N = L::kLanes;
  using S = typename StateOf<T>::type;
  if constexpr (RealOf<T>::is_complex) {
    using V = Vector<typename RealOf<T>::type, N>;
    const V low = load_raw<V>(half<0>(lanes), p), high = load_raw<V>(half<1>(lanes), p + N / 2);
    return Vector<S, N>{every_other<0, N>(low, high), every_other<1, N>(low, high)};
  } else if constexpr (sizeof(T) == sizeof(S)) {
    return load_raw<Vector<S, N>>(lanes, p);
  } else {
    const auto narrow = load_raw<Vector<uint16_t, N>>(lanes, p);
#if defined(__AVX512F__)
    if constexpr (__is_same(T, Float16)) return (Vector<S, N>)_mm512_cvtph_ps((__m256i)narrow);
#elif defined(__F16C__)
    if constexpr (__is_same(T, Float16)) return (Vector<S, N>)_mm256_cvtph_ps((__m128i)narrow);
#endif
    return Half<N, T>::widen(widen_bits<N>(narrow));
  }
}

// Converts v to the element type and stores its valid lanes at p.
template <class L, class T>
MRU_INLINE void store(L lanes, T* p, Vector<typename StateOf<T>::type, L::kLanes> v) {
  constexpr int N = L::kLanes;
  if constexpr (RealOf<T>::is_complex) {
    store_raw(half<0>(lanes), p, in_turn<0, N>(v.re, v.im));
    store_raw(half<1>(lanes), p + N / 2, in_turn<N / 2, N>(v.re, v.im));
  } else if constexpr (sizeof(T) == sizeof(typename StateOf<T>::type)) {
    store_raw(lanes, p, v);
  } else {
#if defined(__AVX512F__)
    if constexpr (__is_same(T, Float16))
      return store_raw(lanes, p, (Vector<uint16_t, N>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    if constexpr (__is_same(T, Float16))
      return store_raw(lanes, p, (Vector<uint16_t, N>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
    store_raw(lanes, p, narrow_bits<N>(Half<N, T>::narrow(v)));
  }
}
// The same for a complex v and real elements, which take its real part.
template <class L, class T>
  requires(!RealOf<T>::is_complex)
MRU_INLINE void store(L lanes, T* p, Complex<Vector<typename StateOf<T>::type, L::kLanes>> v) {
  store(lanes, p, v.re);
}

// Whether rows of n elements, at `at` and at multiples of `step` from there, consist of whole lines of the cache.
template <class T>
MRU_INLINE bool are_whole_lines(const T* at, int64_t step, int64_t n) {
  constexpr int64_t kSize = sizeof(T);
  return (uintptr_t(at) | uintptr_t(step * kSize) | uintptr_t(n * kSize)) % kLine == 0;
}
// Stores a result, by non-temporal stores if `non_temporal`. kMay: whether that can be; then its rows are whole lines.
template <bool kMay, class L, class T, class V>
MRU_INLINE void store_result(bool non_temporal, L lanes, T* p, V v) {
  if constexpr (kMay && L::kFull)
    if (non_temporal) return store(NonTemporal<L::kLanes>{}, p, v);
  store(lanes, p, v);
}

}  // namespace mru
