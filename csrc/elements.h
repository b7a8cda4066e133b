// Elements of streams that C++ has no type for, and the type of the states that streams of a type have.
#pragma once
#include <cstdint>

#include "lanes.h"

namespace mru {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};
template <class S>
struct StateOf<Complex<S>> {
  using type = Complex<S>;
};

}  // namespace mru
