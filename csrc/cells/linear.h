// Linear recurrence, real or complex: minGRU (arXiv 2410.01201), LRU (arXiv 2303.06349).
//
//   s' = a s + w
//
// Inputs: w, a. The members are those that bmru.h describes. A NaN stays by itself.
#pragma once
#include "lanes.h"

namespace mru {

template <class S>
struct Linear {
  static constexpr int kInputs = 2;
  static constexpr bool kEvents = false;
  static constexpr bool kForgets = false;

  using Real = typename RealOf<S>::type;
  MRU_INLINE explicit Linear(Real /*epsilon*/, const Surrogate<Real>& = {}) {}

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    return x[1] * s + x[0];
  }
  template <class V>
  MRU_INLINE V redo(const V* x, V s) const {
    return step(x, s);
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    return conj(x[1]) * m;
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V lambda, V* dx) const {
    dx[0] = lambda;
    dx[1] = lambda * conj(s);
    return pull(x, lambda);
  }
};

}  // namespace mru
