// Bistable memory recurrent unit: BMRU (epsilon 0), CMRU (epsilon 1). arXiv 2601.09495, arXiv 2605.11855.
//
//   z = H(|c| - |b|)    v = m sgn(c)    s' = z (v + epsilon s) + (1 - z) s    h = alpha s'
//
// A cell is a struct over the state's scalar S that offers, on any value type V (see lanes.h), where x are its
// inputs at one step and s the state before it:
//   kInputs, kEvents       how many inputs; whether a step fits 2 bits (hold, one of two writes, NaN)
//   kForgets               whether epsilon 0 means that a write forgets the state
//   step(x, s)             the state after
//   redo(x, s)             the same where nothing is NaN, which is all that gradients need
//   pull(x, m)             conj(a) m, where a is the factor of the affine form s' = a s + w
//   vjp(x, s, lambda, dx)  dx = gradients of the inputs, lambda = dL/ds'; returns pull(x, lambda)
//   encode(x), step_event(code, s), pull_event(code, m)     the same from an event code (kEvents only)
//   value(x, first, second)                                which of two a write writes (kEvents only): kFirstValue and
//                                                          kSecondValue times the same
#pragma once
#include "write_or_hold.h"

namespace mru {

template <class S, bool kAmplitude>
struct Bmru {
  static constexpr int kInputs = kAmplitude ? 3 : 2;
  static constexpr bool kEvents = !kAmplitude;
  static constexpr bool kForgets = true;
  static constexpr int kFirstValue = 1, kSecondValue = -1;  // what events write

  WriteOrHold<S> rule;
  Surrogate<S> surrogate;  // of `vjp` only

  MRU_INLINE explicit Bmru(S epsilon, const Surrogate<S>& surrogate = {}) : rule{epsilon}, surrogate(surrogate) {}

  // The gate compares, it does not subtract: a tie writes.
  template <class V>
  static MRU_INLINE auto writes(const V* x) {
    return Lanes<V>::abs(x[0]) >= Lanes<V>::abs(x[1]);
  }
  template <class V>
  static MRU_INLINE auto has_nan(const V* x) {
    const auto nan = (x[0] != x[0]) | (x[1] != x[1]);
    if constexpr (kAmplitude) return nan | (x[2] != x[2]);
    else return nan;
  }
  template <class V>
  static MRU_INLINE V amplitude(const V* x) {
    if constexpr (kAmplitude) return x[2];
    else return splat<V>(1);
  }

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    return rule.next(writes(x), has_nan(x), turned(amplitude(x), x[0]), s);
  }
  template <class V>
  MRU_INLINE V redo(const V* x, V s) const {
    return rule.redo(writes(x), turned(amplitude(x), x[0]), s);
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    return writes(x) ? rule.scaled(m) : m;
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V lambda, V* dx) const {
    const V m = amplitude(x), gained = lambda * splat<V>(surrogate.gain);
    const V dz = gained * multiply_add(splat<V>(rule.epsilon - 1), s, turned(m, x[0]));
    const V dgate = dz * step_slope(Lanes<V>::abs(x[0]) - Lanes<V>::abs(x[1]), surrogate);
    const V written = writes(x) ? gained : splat<V>(0);
    dx[0] = multiply_add(written * m, sgn_slope(x[0], surrogate), signed_as(dgate, x[0]));
    dx[1] = -signed_as(dgate, x[1]);
    if constexpr (kAmplitude) dx[2] = turned(writes(x) ? lambda : splat<V>(0), x[0]);
    return pull(x, lambda);
  }

  template <class V>
  static MRU_INLINE V value(const V* x, V first, V) {
    return turned(first, x[0]);
  }
  template <class V>
  MRU_INLINE auto encode(const V* x) const {
    return rule.template encode<typename Lanes<V>::Int>(writes(x), has_nan(x), x[0] < splat<V>(0));
  }
  template <class V, class Int>
  MRU_INLINE V step_event(Int code, V s) const {
    return rule.next_from(code, splat<V>(kFirstValue), splat<V>(kSecondValue), s);
  }
  template <class V, class Int>
  MRU_INLINE V pull_event(Int code, V m) const {
    return (code & kFirst) != 0 ? rule.scaled(m) : m;
  }
};

}  // namespace mru
