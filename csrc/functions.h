// Functions of vectors, for the CPU kernels of cells that mru_kernels.define_cell prints. A NaN gives NaN. Exponentials, tanh and
// logarithms are our own (cpu/kernels/elementary.h); they, and what follows from them, differ from the C library by a few units
// in the last place. Others are the C library's, lane by lane.
#pragma once
#include "cpu/kernels/vector.h"

namespace mru {

#define MRU_EACH_LANE(name, of_float, of_double)                    \
  template <class V>                                                \
  MRU_INLINE V name(V x) {                                          \
    return Lanes<V>::each(x, [](auto a) {                           \
      if constexpr (sizeof(a) == sizeof(float)) return of_float(a); \
      else return of_double(a);                                     \
    });                                                             \
  }
MRU_EACH_LANE(sine, __builtin_sinf, __builtin_sin)
MRU_EACH_LANE(cosine, __builtin_cosf, __builtin_cos)
MRU_EACH_LANE(error_function, __builtin_erff, __builtin_erf)
#undef MRU_EACH_LANE

template <class V>
MRU_INLINE V power(V x, V y) {
  int i = 0;
  return Lanes<V>::each(x, [&](auto a) {
    if constexpr (sizeof(a) == sizeof(float)) return __builtin_powf(a, y[i++]);
    else return __builtin_pow(a, y[i++]);
  });
}
template <class V>
MRU_INLINE V maximum(V x, V y) {
  return (x > y) | (x != x) ? x : y;
}
template <class V>
MRU_INLINE V minimum(V x, V y) {
  return (x < y) | (x != x) ? x : y;
}

#define MRU_OF_LANES(name, function) \
  template <class V>                 \
  MRU_INLINE V name(V x) {           \
    return Lanes<V>::function(x);    \
  }
MRU_OF_LANES(exponential, exp)
MRU_OF_LANES(exponential_minus_1, expm1)
MRU_OF_LANES(logarithm, log)
MRU_OF_LANES(logarithm_of_1_plus, log1p)
MRU_OF_LANES(square_root, sqrt)
#undef MRU_OF_LANES

template <class V>
MRU_INLINE V sigmoid(V x) {
  return splat<V>(1) / (splat<V>(1) + exponential(-x));
}

}  // namespace mru
