// Linear recurrence, real or complex: LRU (arXiv 2303.06349).
//
//   s' = a s + w    h = s'        inputs: w, a
#pragma once
#include "../cell.h"

namespace mru {

template <class S>
struct LinearRecurrence : CellBase {
  MRU_INLINE explicit LinearRecurrence(const double*) {}

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    return x[1] * s + x[0];
  }
  template <class V>
  MRU_INLINE V recompute(const V* x, V s) const {
    return step(x, s);
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    return conj(x[1]) * m;
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V, V g, V m, V* dx) const {
    const V lambda = g + m;
    dx[0] = lambda;
    dx[1] = lambda * conj(s);
    return pull(x, lambda);
  }
};

namespace cells {
struct linear_recurrence : Declaration<linear_recurrence> {
  static constexpr InputKind kInputs[] = {kStream, kEither};
  static constexpr bool kComplex = true;  // also takes complex streams
  template <class S, unsigned>
  using Cell = LinearRecurrence<S>;
};
}  // namespace cells

}  // namespace mru
