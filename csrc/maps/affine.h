// Steps as one map of the state, s -> a s + b; of the adjoint, m -> a m + b. Maps compose, so segments of time can be scanned in
// parallel. Every rule for NaN, 0 and infinity of composition is in this file.
#pragma once
#include "../lanes.h"

namespace mru {

template <class S>
struct Affine {
  S a, b;

  static MRU_INLINE Affine identity() { return {S(1), S(0)}; }
  // The map of a step that sets the state to b.
  static MRU_INLINE Affine constant(S b) { return {S(0), b}; }
  // The map of steps in which a sequence begins (for the adjoint: ends). It ignores the state on entry, NaN included. A NaN
  // factor marks it: where an input makes a factor NaN, b is NaN as well, and nothing is lost.
  static MRU_INLINE Affine head(S b) { return {S(__builtin_nan("")), b}; }
  MRU_INLINE bool is_head() const { return a != a; }

  // A factor 0 comes from a write that overwrites, or from a decay of 0. It leaves b of any number, infinity included, and a NaN
  // state stays NaN.
  MRU_INLINE S apply(S s) const {
    const bool alone = (a == S(0) && s == s) || is_head();
    const S both = a * s + b;
    return alone ? b : both;
  }
  // `apply` where no number is infinite or NaN, in the one instruction that a device has for it.
  MRU_INLINE S apply_finite(S s) const {
    if constexpr (RealOf<S>::is_complex) return a * s + b;
    else return multiply_add(a, s, b);
  }
  // This map, then `next`.
  MRU_INLINE Affine then(Affine next) const { return {next.a * a, next.apply(b)}; }
  // The same for a `next` of steps that overwrite the state with `s`: nothing is computed, and NaN stays.
  MRU_INLINE Affine then_overwrite_with(S s) const { return {S(0), b == b ? s : b}; }

  // The rest is for cells whose writes overwrite the state: every factor is 0 or 1, and a factor 0 drops any s, NaN included.
  // A state that is held (a = 1, b = 0) is copied, with the sign of its zero.
  MRU_INLINE S apply_overwriting(S s) const {
    const S both = b == S(0) ? s : s + b;
    return a == S(0) ? b : both;
  }
  MRU_INLINE Affine then_overwriting(Affine next) const {
    return {next.a == S(0) ? next.a : a, next.apply_overwriting(b)};
  }
  // Whether the result does not depend on the state on entry.
  MRU_INLINE bool is_settled() const { return a == S(0) || !(b == b); }
  // `before`, then this map, for maps of the adjoint: values are added or left out.
  MRU_INLINE Affine after_selecting(Affine before) const {
    const bool holds = a != S(0);
    return {holds ? before.a : a, holds ? b + before.b : b};
  }
};

}  // namespace mru
