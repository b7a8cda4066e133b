// Steps as one map of the state, s -> a s + b; of the adjoint, m -> a m + b. Maps compose, so segments of time can be scanned in
// parallel. Every rule for NaN, 0 and infinity of composition is in this file.
#pragma once
#include "../lanes.h"

namespace mru {

template <class S>
struct Affine {
  S a, b;

  static MRU_INLINE Affine identity() { return {S(1), S(0)}; }
  // The map of steps in which a sequence begins (for the adjoint: ends). It ignores the state on entry, NaN included. A NaN
  // factor marks it: where an input makes a factor NaN, b is NaN as well, and nothing is lost.
  static MRU_INLINE Affine head(S b) { return {S(__builtin_nan("")), b}; }
  MRU_INLINE bool is_head() const { return a != a; }

  // A factor 0 comes from a write that resets, or from a decay of 0. It leaves b of any number, infinity included, and a NaN
  // state stays NaN.
  MRU_INLINE S apply(S s) const {
    const bool alone = (a == S(0) && s == s) || is_head();
    const S both = a * s + b;
    return alone ? b : both;
  }
  // This map, then `next`.
  MRU_INLINE Affine then(Affine next) const { return {next.a * a, next.apply(b)}; }

  // The same for cells whose writes reset the state: a is 0 or 1, and a = 0 drops any s, NaN included. A state that is held
  // (a = 1, b = 0) is copied, with the sign of its zero.
  MRU_INLINE S apply_reset(S s) const {
    const S both = b == S(0) ? s : s + b;
    return a == S(0) ? b : both;
  }
  MRU_INLINE Affine then_reset(Affine next) const { return {next.a * a, next.apply_reset(b)}; }
  // Whether the result does not depend on the state on entry.
  MRU_INLINE bool is_settled() const { return a == S(0) || !(b == b); }
};

}  // namespace mru
