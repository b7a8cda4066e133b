// The step of the bistable cells: a select. Where the gate writes, s' = v + epsilon s; elsewhere s' = s. NaN is absorbing: a
// NaN input makes the state NaN, and a NaN state is never overwritten.
#pragma once
#include "../cell.h"

namespace mru {

// Write codes: a step of a cell that writes one of two values, in 2 bits: whether it writes; whether it writes the second
// value, or the step is NaN. A word holds 16 codes as two planes of bits: that of step t is code << t.
constexpr int kHold = 0, kFirst = 1, kSecond = 0x10001, kNan = 0x10000;
constexpr int kCodeMask = 0x10001, kWrites = 0xffff;

// A base of cells. `Self` has writes(x), has_nan(x), written(x) (v above), and, for codes, kFirstValue, kSecondValue,
// value(x, first, second) and is_second(x). Its last input is alpha: h = alpha s'.
template <class Self, class S>
struct WriteOrHold : CellBase {
  static constexpr bool kOverwrites = true;

  S epsilon;

  MRU_INLINE explicit WriteOrHold(S epsilon) : epsilon(epsilon) {}

  MRU_INLINE bool overwrites() const { return epsilon == S(0); }
  MRU_INLINE Self overwriting() const {
    Self same = self();
    same.epsilon = 0;
    return same;
  }

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    return next(self().writes(x), self().has_nan(x), self().written(x), s);
  }
  template <class V>
  MRU_INLINE V recompute(const V* x, V s) const {
    return self().writes(x) ? self().written(x) + scaled(s) : s;
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    return self().writes(x) ? scaled(m) : m;
  }

  template <class V>
  MRU_INLINE V output(const V* x, V, V after) const {
    return alpha(x) * after;
  }
  template <class V>
  MRU_INLINE V cotangent(const V* x, V, V, V g, V m) const {
    return multiply_add(alpha(x), g, m);
  }
  // A NaN alpha makes its channel NaN.
  template <class V>
  MRU_INLINE V enter(const V* x, V s) const {
    return alpha(x) == alpha(x) ? s : alpha(x);
  }

  template <class V>
  MRU_INLINE auto encode(const V* x) const {
    using Int = typename Lanes<V>::Int;
    const Int value = self().is_second(x) ? Int{} + kSecond : Int{} + kFirst;
    const Int code = self().writes(x) ? value : Int{} + kHold;
    return self().has_nan(x) ? Int{} + kNan : code;
  }
  template <class V, class Int>
  MRU_INLINE V step_code(Int code, V s) const {
    const V first = splat<V>(Self::kFirstValue), second = splat<V>(Self::kSecondValue);
    return next(code != kHold, code == kNan, code == kSecond ? second : first, s);
  }
  template <class V, class Int>
  MRU_INLINE V pull_code(Int code, V m) const {
    return (code & kFirst) != 0 ? scaled(m) : m;
  }

 protected:
  template <class V>
  static MRU_INLINE V alpha(const V* x) {
    return x[Self::kAlpha];
  }
  // epsilon s, and 0 for any s if epsilon is 0. A select in lanes: a branch would stay in the loops of the CPU kernels.
  template <class V>
  MRU_INLINE V scaled(V s) const {
    const V factor = splat<V>(epsilon);
    return factor == splat<V>(0) ? splat<V>(0) : factor * s;
  }

 private:
  MRU_INLINE const Self& self() const { return static_cast<const Self&>(*this); }
  template <class Write, class Nan, class V>
  MRU_INLINE V next(Write write, Nan nan, V v, V s) const {
    const V after = (write & (s == s)) ? v + scaled(s) : s;
    return nan ? splat<V>(S(__builtin_nan(""))) : after;
  }
};

}  // namespace mru
