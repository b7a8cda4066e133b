// The functions that minGRU and minLSTM share. arXiv 2410.01201.
#pragma once
#include "lanes.h"

namespace mru {

// e^-|x|. With e, sigmoid(x) and sigmoid(-x) are 1 and e over 1 + e, in the order that the sign of x gives. Neither cancels.
template <class V>
MRU_INLINE V exp_of_minus_abs(V x) {
  return Lanes<V>::exp(-Lanes<V>::abs(x));
}
// The numerators of sigmoid(x) and sigmoid(-x).
template <class V>
MRU_INLINE V sigmoid_numerator(V x, V e) {
  return x >= V{} ? splat<V>(1) : e;
}
template <class V>
MRU_INLINE V sigmoid_numerator_of_minus(V x, V e) {
  return x >= V{} ? e : splat<V>(1);
}

// g(c) = c + 1/2 for c >= 0, else sigmoid(c), and its derivative. e: e^-|c|; over: 1 / (1 + e).
template <class V>
MRU_INLINE V candidate_value(V c, V e, V over) {
  return c >= V{} ? c + splat<V>(0.5) : e * over;
}
template <class V>
MRU_INLINE V candidate_slope(V c, V e, V over) {
  return c >= V{} ? splat<V>(1) : e * over * over;
}

}  // namespace mru
