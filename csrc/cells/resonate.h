// Resonate-and-fire neuron without a reset, of PRF. arXiv 2410.03530.
//
//   u' = a u + delta x    h = H(Re u' - V), or Re u'        inputs: x, a, delta, V
//
// The state is complex, all else but a is real. H(0) is 1 if ties fire, else 0. A NaN of Re u' - V is one of h.
#pragma once
#include "../cell.h"
#include "../surrogate.h"

namespace mru {

template <class S>
struct Resonate : CellBase {
  static constexpr bool kAdjointSeesState = true;
  using Real = typename RealOf<S>::type;

  Surrogate<Real> surrogate;
  bool ties_fire, emits_membrane;

  // scalars: surrogate_scale; mode, whose bit 0 is set if ties fire, and bit 1 if h is Re u'
  MRU_INLINE explicit Resonate(const double* scalars)
      : surrogate(scalars[0]), ties_fire((int(scalars[1]) & 1) != 0), emits_membrane((int(scalars[1]) & 2) != 0) {}

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    return x[1] * s + V(x[2].re * x[0].re);
  }
  template <class V>
  MRU_INLINE V recompute(const V* x, V s) const {
    return step(x, s);
  }
  template <class V>
  MRU_INLINE V output(const V* x, V, V after) const {
    if (emits_membrane) return after;
    const auto v = after.re - x[3].re;
    using R = typename RealOf<V>::type;
    const R zero = splat<R>(0), one = splat<R>(1);
    const R above = v > zero ? one : v - v;  // NaN stays, and infinity fires
    return V(v == zero ? splat<R>(ties_fire ? 1 : 0) : (v < zero ? zero : above));
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    return conj(x[1]) * m;
  }
  // The gradient of Re u' that comes from h.
  template <class V>
  MRU_INLINE auto of_output(const V* x, V after, V g) const {
    using R = typename RealOf<V>::type;
    if (emits_membrane) return g.re;
    return R(g.re * splat<R>(surrogate.gain) * step_slope(after.re - x[3].re, surrogate));
  }
  template <class V>
  MRU_INLINE V cotangent(const V* x, V, V after, V g, V m) const {
    return {m.re + of_output(x, after, g), m.im};
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V after, V g, V m, V* dx) const {
    using R = typename RealOf<V>::type;
    const R q = of_output(x, after, g);
    const V lambda{m.re + q, m.im};
    dx[0] = V(x[2].re * lambda.re);
    dx[1] = lambda * conj(s);
    dx[2] = V(x[0].re * lambda.re);
    dx[3] = V(emits_membrane ? splat<R>(0) : -q);
    return pull(x, lambda);
  }
};

namespace cells {
struct resonate : Declaration<resonate> {
  static constexpr InputKind kInputs[] = {kStream, kComplexChannel, kChannel, kChannel};
  static constexpr Scalar kScalars[] = {positive("surrogate_scale"), {"mode", 0, 3}};
  static constexpr bool kComplex = false;
  template <class E>
  using State = Complex<typename StateOf<E>::type>;
  template <class S, unsigned>
  using Cell = Resonate<S>;
};
}  // namespace cells

}  // namespace mru
