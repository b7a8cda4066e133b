// Compensated sums, which gradients of per-channel inputs need over long times.
#pragma once
#include "lanes.h"

namespace mru {

// A sum of any number of terms to about the last place. `lost` is what the additions rounded away (two-sum); NaN once `sum`
// is infinite or NaN. Terms may themselves be sums of up to kSummed terms, which a loop adds plainly.
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
