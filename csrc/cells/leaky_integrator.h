// Leaky integrator with a bounded output: the example of a cell. Its output is not its state.
//
//   s' = a s + x    h = tanh(s')        inputs: x, a
#pragma once
#include "../cell.h"

namespace mru {

template <class S>
struct LeakyIntegrator : CellBase {
  static constexpr bool kAdjointSeesState = true;  // dL/ds' contains tanh'(s')

  MRU_INLINE explicit LeakyIntegrator(const double*) {}

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    return x[1] * s + x[0];
  }
  template <class V>
  MRU_INLINE V recompute(const V* x, V s) const {
    return step(x, s);
  }
  template <class V>
  MRU_INLINE V output(const V*, V, V after) const {
    return tanh(after);
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    return x[1] * m;
  }
  template <class V>
  MRU_INLINE V cotangent(const V*, V, V after, V g, V m) const {
    const V h = tanh(after);
    return multiply_add(splat<V>(1) - h * h, g, m);
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V after, V g, V m, V* dx) const {
    const V lambda = cotangent(x, s, after, g, m);
    dx[0] = lambda;
    dx[1] = lambda * s;
    return pull(x, lambda);
  }
};

namespace cells {
struct leaky_integrator : Declaration<leaky_integrator> {
  static constexpr InputKind kInputs[] = {kStream, kEither};
  static constexpr bool kComplex = false;
  template <class S, unsigned>
  using Cell = LeakyIntegrator<S>;
};
}  // namespace cells

}  // namespace mru
