// Leaky integrate-and-fire neuron. The state U is the membrane before its own reset, which the next step makes.
//
//   S = H(U - theta)    U' = next(U, S, I)    h = H(U' - theta), or U'        inputs: I, beta, theta
//
//   reset             next
//   none              beta U + I
//   subtract          beta U + I - theta S
//   subtract_decayed  beta (U - theta S) + I
//   zero              S ? I : beta U + I
//   zero_input        S ? 0 : beta U + I        but a NaN of I stays
//
// A step rounds each operation in this order, and nothing is fused: the last bit of U may decide a spike.
#pragma once
#include "../cell.h"
#include "../spike.h"

namespace mru {

template <class S>
struct Lif : CellBase {
  static constexpr bool kAdjointSeesState = true, kComposes = false;
  enum Reset { kNone, kSubtract, kSubtractDecayed, kZero, kZeroInput };

  Reset reset;
  bool detached;  // whether gradients pass by the reset
  bool membrane;  // whether h is the membrane
  Spike<S> spike;

  // scalars: the number of a mode (mru_kernels/cells/lif.py), surrogate_scale
  MRU_INLINE explicit Lif(const double* scalars) : Lif(int(scalars[0]), scalars[1]) {}
  MRU_INLINE Lif(int mode, double steepness)
      : reset(Reset(mode % 5)),
        detached(mode / 50 % 2),
        membrane(mode / 100),
        spike(SlopeOf(mode / 10 % 5), mode / 5 % 2, steepness) {}

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    const V zero = splat<V>(0);
    const auto fires = spike.fires(s, x[2]);
    const V fall = fires ? x[2] : zero;
    const V moved = x[1] * (reset == kSubtractDecayed ? s - fall : s) + x[0];
    if (reset == kSubtract) return moved - fall;
    if (!to_zero()) return moved;
    return fires ? (reset == kZero ? x[0] : (x[0] == x[0] ? zero : x[0])) : moved;
  }
  template <class V>
  MRU_INLINE V recompute(const V* x, V s) const {
    return step(x, s);
  }
  template <class V>
  MRU_INLINE V output(const V* x, V, V after) const {
    return membrane ? after : spike.emit(after, x[2]);
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V s, V m) const {
    return pulled(x, s, m, through_spike(x, s, m));
  }
  template <class V>
  MRU_INLINE V cotangent(const V* x, V, V after, V g, V m) const {
    return of_output(x, after, g) + m;
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V after, V g, V m, V* dx) const {
    const V zero = splat<V>(0), q = of_output(x, after, g), lambda = q + m, through = through_spike(x, s, lambda);
    const auto fires = spike.fires(s, x[2]);
    dx[0] = reset == kZeroInput ? (fires ? zero : lambda) : lambda;
    V kept = s;  // what is multiplied by beta
    if (reset == kSubtractDecayed) kept = s - (fires ? x[2] : zero);
    if (to_zero()) kept = fires ? zero : s;
    dx[1] = lambda * kept;
    V of_theta = through;
    if (reset == kSubtract) of_theta = through - (fires ? lambda : zero);
    if (reset == kSubtractDecayed) of_theta = through - (fires ? x[1] * lambda : zero);
    dx[2] = membrane ? of_theta : of_theta - q;
    return pulled(x, s, lambda, through);
  }
  // A NaN decay or threshold makes its channel NaN, which no reset hides.
  template <class V>
  MRU_INLINE V enter(const V* x, V s) const {
    return x[2] == x[2] ? (x[1] == x[1] ? s : x[1]) : x[2];
  }

 private:
  MRU_INLINE bool to_zero() const { return reset == kZero || reset == kZeroInput; }
  // What g, the gradient of h, gives to that of U'.
  template <class V>
  MRU_INLINE V of_output(const V* x, V after, V g) const {
    return membrane ? g : spike.times_slope(g, after, x[2]);
  }
  // m times -dU'/dS dS/dU, as far as gradients follow the reset: what U gives to U' through its spike, negative.
  template <class V>
  MRU_INLINE V through_spike(const V* x, V s, V m) const {
    const V zero = splat<V>(0);
    if (detached || reset == kNone) return zero;
    const V slope = spike.times_slope(splat<V>(1), s, x[2]);
    V drop = x[2];
    if (reset == kSubtractDecayed) drop = x[1] * x[2];
    if (to_zero()) drop = reset == kZero ? x[1] * s : x[1] * s + x[0];
    return slope == zero ? zero : drop * slope * m;  // an infinite s has no slope
  }
  // dU'/dU m without the reset, minus `through`, the part of the reset.
  template <class V>
  MRU_INLINE V pulled(const V* x, V s, V m, V through) const {
    V kept = x[1] * m;
    if (to_zero()) kept = spike.fires(s, x[2]) ? splat<V>(0) : kept;
    return kept - through;
  }
};

namespace cells {
struct lif : Declaration<lif> {
  static constexpr InputKind kInputs[] = {kStream, kChannel, kChannel};
  static constexpr Scalar kScalars[] = {{"mode", 0, 199}, positive("surrogate_scale")};
  static constexpr bool kComplex = false;
  template <class S, unsigned>
  using Cell = Lif<S>;
};
}  // namespace cells

}  // namespace mru
