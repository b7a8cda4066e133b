// How the CUDA kernels access memory: elements of a stream and their state type, vectors that move as 16-byte words,
// and every load and store of global memory. The host execution (csrc/simt) counts the bytes that these functions move.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

#include "../elements.h"
#ifndef __CUDACC__
#include "../cpu/kernels/vector.h"  // conversions of half precision
#endif

namespace mru::cuda {

// N values. In memory they are aligned to their size, at most to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T at[N];
};

template <class S>
__device__ __forceinline__ S quiet_nan() {
  return S(__builtin_nan(""));
}
template <class S>
__device__ __forceinline__ bool is_nan(S x) {
  return !(x == x);
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// What the bytes belong to: tests state the budget of a pass per kind. kMask is the mask of resets; kIndex are offsets
// and bits of the mask. kPassing is a stream that leaves the second-level cache first, so that codes, which the next
// launch reads, stay there. kSlot is a state that the launch updates in place.
enum class Traffic { kStream, kCodes, kState, kIndex, kMask, kPassing, kSlot };

#ifdef __CUDACC__

template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = unsigned char;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// But for kSlot, a kernel reads nothing that its own launch writes, so loads may take the read-only path.
template <Traffic kind, class Word>
__device__ __forceinline__ Word load_word(const Word* p) {
  if constexpr (kind == Traffic::kSlot) return __ldcg(p);
  else return __ldg(p);
}
__device__ __forceinline__ uint64_t leaves_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// In PTX, because `advance` hides that a pointer is global, and because the compiler might split a word.
template <Traffic kind>
__device__ __forceinline__ void store_word(uint4* p, uint4 w) {
  if constexpr (kind == Traffic::kPassing)
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;"
                 :
                 : "l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(leaves_first()));
  else asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" : : "l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w));
}
template <Traffic>
__device__ __forceinline__ void store_word(uint2* p, uint2 w) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(p), "r"(w.x), "r"(w.y));
}
template <Traffic>
__device__ __forceinline__ void store_word(unsigned int* p, unsigned int w) {
  asm volatile("st.global.u32 [%0], %1;" : : "l"(p), "r"(w));
}
template <Traffic>
__device__ __forceinline__ void store_word(unsigned short* p, unsigned short w) {
  asm volatile("st.global.u16 [%0], %1;" : : "l"(p), "h"(w));
}

// p + step. The empty asm keeps the compiler from holding every multiple of a stride in registers.
template <class T>
__device__ __forceinline__ T* advance(T* p, int64_t step) {
  p += step;
  asm("" : "+l"(p));
  return p;
}

// Asynchronous copies of a thread from global to shared memory. `commit_copies` closes a group of copies;
// `wait_for_copies` waits until at most n groups are under way.
template <Traffic kind, class Word>
__device__ __forceinline__ void copy_word_ahead(Word* to, const Word* from) {
  static_assert(sizeof(Word) == 4 || sizeof(Word) == 8 || sizeof(Word) == 16);
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  if constexpr (sizeof(Word) == 16 && kind == Traffic::kPassing)
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
                 :
                 : "r"(at), "l"(from), "l"(leaves_first()));
  else if constexpr (sizeof(Word) == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(at), "l"(from));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" : : "r"(at), "l"(from), "n"(int(sizeof(Word))));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int n>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(n) : "memory");
}

// A volatile load of shared memory: the compiler reads the word again instead of keeping it, and what it made of it, in
// registers.
__device__ __forceinline__ uint4 read_word_again(const uint4* p) {
  uint4 w;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
               : "r"(unsigned(__cvta_generic_to_shared(p))));
  return w;
}
__device__ __forceinline__ uint2 read_word_again(const uint2* p) {
  uint2 w;
  asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(w.x), "=r"(w.y)
               : "r"(unsigned(__cvta_generic_to_shared(p))));
  return w;
}
template <class Word>
__device__ __forceinline__ Word read_word_again(const Word* p) {
  return *static_cast<const volatile Word*>(p);
}

// Dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Two values in one word, the first in the low half, rounded to nearest even.
__device__ __forceinline__ uint32_t narrow_pair(BFloat16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t narrow_pair(Float16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#else

template <int kBytes>
struct WordOf {
  using type = struct alignas(kBytes) {
    unsigned char bytes[kBytes];
  };
};

constexpr int counted(Traffic kind) {
  switch (kind) {
    case Traffic::kPassing: return int(Traffic::kStream);
    case Traffic::kSlot: return int(Traffic::kState);
    default: return int(kind);
  }
}
template <Traffic kind, class Word>
Word load_word(const Word* p) {
  return simt::load(counted(kind), p);
}
template <Traffic kind, class Word>
void store_word(Word* p, Word word) {
  simt::store(counted(kind), p, word);
}

template <Traffic kind, class Word>
void copy_word_ahead(Word* to, const Word* from) {
  simt::copy_ahead(counted(kind), to, from);
}
inline void commit_copies() { simt::commit_copies(); }
template <class Word>
Word read_word_again(const Word* p) {
  return *p;
}
template <int n>
void wait_for_copies() {
  simt::wait_for_copies(n);
}

template <class T>
T* advance(T* p, int64_t step) {
  return p + step;
}
inline unsigned char* shared_memory() { return simt::shared_memory(); }

inline float widen(BFloat16 x) { return Half<1, BFloat16>::widen(x.bits); }
inline float widen(Float16 x) { return Half<1, Float16>::widen(x.bits); }
inline uint32_t narrow_pair(BFloat16, float low, float high) {
  return Half<1, BFloat16>::narrow(low) | Half<1, BFloat16>::narrow(high) << 16;
}
inline uint32_t narrow_pair(Float16, float low, float high) {
  return Half<1, Float16>::narrow(low) | Half<1, Float16>::narrow(high) << 16;
}

#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
template <class S>
__device__ __forceinline__ Complex<S> widen(Complex<S> x) {
  return x;
}

// Element i of a vector, as a state.
template <class T, int N>
__device__ __forceinline__ auto widen(const Vector<T, N>& v, int i) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, BFloat16> && N % 2 == 0) {  // a shift or a mask of the register that holds two
    const uint32_t pair = bits_as<Vector<uint32_t, N / 2>>(v).at[i / 2];
    return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  }
#endif
  return widen(v.at[i]);
}

template <class T, int N>
__device__ __forceinline__ auto widen_all(const Vector<T, N>& v) {
  Vector<typename StateOf<T>::type, N> x;
#pragma unroll
  for (int i = 0; i < N; ++i) x.at[i] = widen(v, i);
  return x;
}

template <Traffic kind, int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* p) {
  using V = Vector<T, N>;
  using Word = typename WordOf<alignof(V)>::type;
  struct Words {
    Word at[sizeof(V) / sizeof(Word)];
  } words;
#pragma unroll
  for (int i = 0; i < int(sizeof(V) / sizeof(Word)); ++i)
    words.at[i] = load_word<kind>(reinterpret_cast<const Word*>(p) + i);
  return bits_as<V>(words);
}

template <Traffic kind, int N, class T>
__device__ __forceinline__ void copy_ahead(Vector<T, N>* to, const T* from) {
  using V = Vector<T, N>;
  using Word = typename WordOf<alignof(V)>::type;
  if constexpr (sizeof(Word) < 4) {  // narrower than the narrowest copy
    *to = load<kind, N>(from);
  } else {
#pragma unroll
    for (int i = 0; i < int(sizeof(V) / sizeof(Word)); ++i)
      copy_word_ahead<kind>(reinterpret_cast<Word*>(to) + i, reinterpret_cast<const Word*>(from) + i);
  }
}

template <Traffic kind, int N, class T>
__device__ __forceinline__ void store(T* p, const Vector<T, N>& v) {
  using Word = typename WordOf<alignof(Vector<T, N>)>::type;
  struct Words {
    Word at[sizeof(v) / sizeof(Word)];
  };
  const Words words = bits_as<Words>(v);
#pragma unroll
  for (int i = 0; i < int(sizeof(v) / sizeof(Word)); ++i) store_word<kind>(reinterpret_cast<Word*>(p) + i, words.at[i]);
}

template <class V>
__device__ __forceinline__ V read_again(const V& v) {
  using Word = typename WordOf<alignof(V)>::type;
  static_assert(sizeof(Word) == sizeof(V));
  return bits_as<V>(read_word_again(reinterpret_cast<const Word*>(&v)));
}

// State values as elements of a stream, rounded once; of complex states under real streams the real parts.
template <class T, int N, class S>
__device__ __forceinline__ Vector<T, N> narrow(const Vector<S, N>& x) {
  if constexpr (RealOf<S>::is_complex && !RealOf<T>::is_complex) {
    Vector<typename RealOf<S>::type, N> parts;
#pragma unroll
    for (int i = 0; i < N; ++i) parts.at[i] = x.at[i].re;
    return narrow<T>(parts);
  } else if constexpr (sizeof(T) == sizeof(S)) {
    return bits_as<Vector<T, N>>(x);
  } else if constexpr (N == 1) {
    return {{T{uint16_t(narrow_pair(T{}, x.at[0], 0.f))}}};
  } else {
    Vector<uint32_t, N / 2> pairs;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs.at[i] = narrow_pair(T{}, x.at[2 * i], x.at[2 * i + 1]);
    return bits_as<Vector<T, N>>(pairs);
  }
}

}  // namespace mru::cuda
