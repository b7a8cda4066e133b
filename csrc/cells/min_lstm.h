// minLSTM with normalised gates: a linear recurrence whose decay and write add up to 1. arXiv 2410.01201.
//
//   s' = (f s + i g(c)) / (f + i)    i = sigmoid(u)    f = sigmoid(v)    g as in min_gru.h    h = s'    inputs: c, u, v
#pragma once
#include "../cell.h"
#include "../min_gates.h"

namespace mru {

template <class S>
struct MinLSTM : CellBase {
  static constexpr bool kGated = true;

  MRU_INLINE explicit MinLSTM(const double*) {}

  // The shares f / (f + i) and i / (f + i). sigmoid(x) = e^min(x, 0) / (1 + e^-|x|), so they are A and B over A + B, where
  // A = e^min(v, 0) (1 + e^-|u|) and B = e^min(u, 0) (1 + e^-|v|), both over the larger of the two exponentials.
  template <class V>
  struct Shares {
    V of_u, of_v;  // e^-|u|, e^-|v|
    V keep, write, sum;

    MRU_INLINE explicit Shares(const V* x) {
      const V u = x[1], v = x[2], zero{}, one = splat<V>(1);
      of_u = exp_of_minus_abs(u), of_v = exp_of_minus_abs(v);
      const V difference = (v < zero ? v : zero) - (u < zero ? u : zero), e = exp_of_minus_abs(difference);
      keep = sigmoid_numerator(difference, e) * (one + of_u);
      write = sigmoid_numerator_of_minus(difference, e) * (one + of_v);
      sum = keep + write;
    }
  };

  template <class V>
  MRU_INLINE V step(const V* x, V s) const {
    const Shares<V> shares(x);
    const V one = splat<V>(1), of_c = exp_of_minus_abs(x[0]);
    const V over_both = one / ((one + of_c) * shares.sum);
    const V over_c = over_both * shares.sum, over_sum = over_both * (one + of_c);
    return shares.keep * over_sum * s + shares.write * over_sum * candidate_value(x[0], of_c, over_c);
  }
  template <class V>
  MRU_INLINE V recompute(const V* x, V s) const {
    return step(x, s);
  }
  template <class V>
  MRU_INLINE V pull(const V* x, V m) const {
    const Shares<V> shares(x);
    return shares.keep / shares.sum * m;
  }
  template <class V>
  MRU_INLINE V vjp(const V* x, V s, V, V g, V m, V* dx) const {
    const Shares<V> shares(x);
    const V one = splat<V>(1), of_c = exp_of_minus_abs(x[0]);
    // One division for 1 / sum, sigmoid(c), sigmoid(-u) and sigmoid(-v): the factors under it are between 1 and 4.
    const V under_c = one + of_c, under_u = one + shares.of_u, under_v = one + shares.of_v;
    const V first = under_c * shares.sum, second = under_u * under_v, over_all = one / (first * second);
    const V over_first = over_all * second, over_second = over_all * first;
    const V over_c = over_first * shares.sum, over_sum = over_first * under_c;

    const V decay = shares.keep * over_sum, write = shares.write * over_sum, lambda = g + m;
    const V of_odds = decay * write * lambda * (candidate_value(x[0], of_c, over_c) - s);  // dL/d log(i / f)
    dx[0] = lambda * write * candidate_slope(x[0], of_c, over_c);
    dx[1] = of_odds * (sigmoid_numerator_of_minus(x[1], shares.of_u) * (over_second * under_v));
    dx[2] = -of_odds * (sigmoid_numerator_of_minus(x[2], shares.of_v) * (over_second * under_u));
    return decay * lambda;
  }
};

namespace cells {
struct min_lstm : Declaration<min_lstm> {
  static constexpr InputKind kInputs[] = {kStream, kStream, kStream};
  static constexpr bool kComplex = false;
  template <class S, unsigned>
  using Cell = MinLSTM<S>;
};
}  // namespace cells

}  // namespace mru
