// minGRU: a linear recurrence whose decay and update are gates of the input. arXiv 2410.01201.
//
//   s' = (1 - z) s + z g(c)    z = sigmoid(u)    g(c) = c >= 0 ? c + 1/2 : sigmoid(c)    h = s'    inputs: c, u
#pragma once
#include "../cell.h"
#include "../min_gates.h"

namespace mru {

template <class S>
struct MinGRU : CellBase {
  static constexpr bool kGated = true;

  MRU_INLINE explicit MinGRU(const double*) {}

  template <class V>
  struct Gates {
    V decay, write, value, slope;  // 1 - z, z, g(c), g'(c)

    // The two sigmoids share one division.
    MRU_INLINE explicit Gates(const V* x) {
      const V c = x[0], u = x[1], one = splat<V>(1);
      const V of_c = exp_of_minus_abs(c), of_u = exp_of_minus_abs(u);
      const V over_both = one / ((one + of_c) * (one + of_u));
      const V over_u = over_both * (one + of_c), over_c = over_both * (one + of_u);
      decay = sigmoid_numerator_of_minus(u, of_u) * over_u;
      write = sigmoid_numerator(u, of_u) * over_u;
      value = candidate_value(c, of_c, over_c);
      slope = candidate_slope(c, of_c, over_c);
    }
  };

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    const Gates<V> gates(x);
    return gates.decay * s + gates.write * gates.value;
  }
  template <class V>
  MRU_INLINE V recompute(const V* x, V s) const {
    return step(x, s);
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    const V e = exp_of_minus_abs(x[1]);
    return sigmoid_numerator_of_minus(x[1], e) / (splat<V>(1) + e) * m;
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V, V g, V m, V* dx) const {
    const Gates<V> gates(x);
    const V lambda = g + m, written = lambda * gates.write;
    dx[0] = written * gates.slope;
    dx[1] = written * gates.decay * (gates.value - s);
    return gates.decay * lambda;
  }
};

namespace cells {
struct min_gru : Declaration<min_gru> {
  static constexpr InputKind kInputs[] = {kStream, kStream};
  static constexpr bool kComplex = false;
  template <class S, unsigned>
  using Cell = MinGRU<S>;
};
}  // namespace cells

}  // namespace mru
