// First-quadrant bistable unit, a Schmitt trigger. arXiv 2605.15216.
//
//   L = H(c - low)    U = H(c - high)    hold = L (1 - U)    s' = hold s + (1 - hold) (U + epsilon s)    h = alpha s'
//
// Inputs: c, low, high. The members are those that bmru.h describes.
#pragma once
#include "write_or_hold.h"

namespace mru {

template <class S>
struct Schmitt {
  static constexpr int kInputs = 3;
  static constexpr bool kEvents = true;
  static constexpr bool kForgets = true;
  static constexpr int kFirstValue = 1, kSecondValue = 0;

  WriteOrHold<S> rule;
  Surrogate<S> surrogate;  // of `vjp` only

  MRU_INLINE explicit Schmitt(S epsilon, const Surrogate<S>& surrogate = {}) : rule{epsilon}, surrogate(surrogate) {}

  template <class V>
  static MRU_INLINE auto lower(const V* x) {
    return x[0] >= x[1];
  }
  template <class V>
  static MRU_INLINE auto upper(const V* x) {
    return x[0] >= x[2];
  }
  template <class V>
  static MRU_INLINE auto writes(const V* x) {
    return (x[0] < x[1]) | upper(x);
  }
  template <class V>
  static MRU_INLINE auto has_nan(const V* x) {
    return (x[0] != x[0]) | (x[1] != x[1]) | (x[2] != x[2]);
  }

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    return rule.next(writes(x), has_nan(x), value(x, splat<V>(1), splat<V>(0)), s);
  }
  template <class V>
  MRU_INLINE V redo(const V* x, V s) const {
    return rule.redo(writes(x), value(x, splat<V>(1), splat<V>(0)), s);
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    return writes(x) ? rule.scaled(m) : m;
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V lambda, V* dx) const {
    const V zero = splat<V>(0), u = upper(x) ? splat<V>(1) : zero;
    const V gained = lambda * splat<V>(surrogate.gain);
    const V dhold = gained * (splat<V>(1 - rule.epsilon) * s - u);
    const V written = writes(x) ? gained : zero;
    const V dupper = (lower(x) ? written - dhold : written) * step_slope(x[0] - x[2], surrogate);
    const V dlower = (upper(x) ? zero : dhold) * step_slope(x[0] - x[1], surrogate);
    dx[0] = dupper + dlower;
    dx[1] = -dlower;
    dx[2] = -dupper;
    return pull(x, lambda);
  }

  template <class V>
  static MRU_INLINE V value(const V* x, V first, V second) {
    return upper(x) ? first : second;
  }
  template <class V>
  MRU_INLINE auto encode(const V* x) const {
    return rule.template encode<typename Lanes<V>::Int>(writes(x), has_nan(x), !upper(x));
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
