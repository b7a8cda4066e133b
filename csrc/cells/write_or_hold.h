// The step that the bistable cells share: a select. Where the gate writes, s' = v + epsilon s; elsewhere s' = s.
// NaN is absorbing: a NaN input makes the state NaN, and a NaN state is never written over.
#pragma once
#include "lanes.h"

namespace mru {

// Event codes: a step of a cell that writes one of two values, in 2 bits: whether it writes; whether that is the second
// value, or the step is NaN. A word holds 16 codes as two planes of bits: that of step t is code << t.
constexpr int kHold = 0, kFirst = 1, kSecond = 0x10001, kNan = 0x10000;
constexpr int kEventMask = 0x10001, kWrites = 0xffff;

template <class S>
struct WriteOrHold {
  S epsilon;

  // epsilon s; nothing is multiplied by 0.
  template <class V>
  MRU_INLINE V scaled(V s) const {
    return epsilon == S(0) ? splat<V>(0) : splat<V>(epsilon) * s;
  }
  template <class Write, class Nan, class V>
  MRU_INLINE V next(Write write, Nan nan, V v, V s) const {
    const V written = (write & (s == s)) ? v + scaled(s) : s;
    return nan ? splat<V>(S(__builtin_nan(""))) : written;
  }
  template <class Write, class V>
  MRU_INLINE V redo(Write write, V v, V s) const {
    return write ? v + scaled(s) : s;
  }
  template <class Int, class Write, class Nan, class Second>
  static MRU_INLINE Int encode(Write write, Nan nan, Second second) {
    const Int value = second ? Int{} + kSecond : Int{} + kFirst, code = write ? value : Int{} + kHold;
    return nan ? Int{} + kNan : code;
  }
  template <class Int, class V>
  MRU_INLINE V next_from(Int code, V first, V second, V s) const {
    return next(code != kHold, code == kNan, code == kSecond ? second : first, s);
  }
};

}  // namespace mru
