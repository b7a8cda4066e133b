// Compensated sums. Gradients of per-channel inputs are sums over batch and time, of many terms.
#pragma once
#include "lanes.h"

namespace mru {

// A sum of any number of terms, right to about the last place. `lost` is the sum of the rounding errors (two-sum); it is NaN
// once `sum` is infinite or NaN. A term may be a plain sum of up to kSummed terms.
constexpr int kSummed = 32;
template <class V>
struct Sum {
  V sum{}, lost{};

  MRU_INLINE void add(V term) {
    const V next = sum + term, added = next - sum;
    lost += (sum - (next - added)) + (term - added);
    sum = next;
  }
  MRU_INLINE V total() const { return total_of(sum, lost); }

 private:
  template <class R>
  static MRU_INLINE R total_of(R sum, R lost) {
    return lost == lost ? sum + lost : sum;
  }
  template <class R>
  static MRU_INLINE Complex<R> total_of(Complex<R> sum, Complex<R> lost) {
    return {total_of(sum.re, lost.re), total_of(sum.im, lost.im)};
  }
};

}  // namespace mru
