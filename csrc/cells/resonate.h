// Resonate-and-fire neuron without a reset, of PRF. arXiv 2410.03530.
//
//   u' = a u + delta x    h = H(Re u' - V), or Re u'        inputs: x, a, delta, V
//
// The state and a are complex, all else is real.
#pragma once
#include "../cell.h"
#include "../spike.h"

namespace mru {

template <class S>
struct Resonate : CellBase {
  static constexpr bool kAdjointSeesState = true;

  bool membrane;  // whether h is Re u'
  Spike<typename RealOf<S>::type> spike;

  // scalars: the number of a mode (mru_kernels/cells/resonate.py), surrogate_scale
  MRU_INLINE explicit Resonate(const double* scalars) : Resonate(int(scalars[0]), scalars[1]) {}
  MRU_INLINE Resonate(int mode, double steepness)
      : membrane(mode / 10), spike(SlopeOf(mode / 2 % 5), mode % 2, steepness) {}

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    const V rotated = x[1] * s;
    return {rotated.re + x[2].re * x[0].re, rotated.im};
  }
  template <class V>
  MRU_INLINE V recompute(const V* x, V s) const {
    return step(x, s);
  }
  template <class V>
  MRU_INLINE V output(const V* x, V, V after) const {
    return membrane ? after : V(spike.emit(after.re, x[3].re));
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    return conj(x[1]) * m;
  }
  template <class V>
  MRU_INLINE V cotangent(const V* x, V, V after, V g, V m) const {
    return {m.re + of_output(x, after, g), m.im};
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V after, V g, V m, V* dx) const {
    using R = typename RealOf<V>::type;
    const R q = of_output(x, after, g), zero{};
    const V lambda{m.re + q, m.im};
    dx[0] = V(x[2].re * lambda.re);
    dx[1] = lambda * conj(s);
    dx[2] = V(x[0].re * lambda.re);
    dx[3] = V(membrane ? zero : -q);
    return pull(x, lambda);
  }
  // A NaN threshold makes its channel NaN.
  template <class V>
  MRU_INLINE V enter(const V* x, V s) const {
    return {x[3].re == x[3].re ? s.re : x[3].re, s.im};
  }

 private:
  // What g, the gradient of h, gives to that of Re u'.
  template <class V>
  MRU_INLINE auto of_output(const V* x, V after, V g) const {
    return membrane ? g.re : spike.times_slope(g.re, after.re, x[3].re);
  }
};

namespace cells {
struct resonate : Declaration<resonate> {
  static constexpr InputKind kInputs[] = {kStream, kComplexChannel, kChannel, kChannel};
  static constexpr Scalar kScalars[] = {{"mode", 0, 19}, positive("surrogate_scale")};
  static constexpr bool kComplex = false;
  template <class E>
  using State = Complex<typename StateOf<E>::type>;
  template <class S, unsigned>
  using Cell = Resonate<S>;
};
}  // namespace cells

}  // namespace mru
