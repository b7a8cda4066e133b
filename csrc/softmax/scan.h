// One call of the softmax recurrence as plain data: what the kernels of every C++ backend are given. No torch in here.
//
//   in[0] score [B, T, H]    in[1] value [B, T, D]    in[2] decay [B, T, H], [H] or not given    in[3] bonus [H] or not given
//   h     y [B, T, D]        states [rows, D + 2 H], in the state dtype: mean | Z | z
#pragma once
#include "../scan.h"

namespace mru::softmax {

enum { kScore, kValue, kDecay, kBonus };

// A Scan of D channels in heads: head h has the channels [h D / H, (h + 1) D / H).
struct HeadScan : Scan {
  int64_t heads = 0;

  int64_t state_bytes() const { return element_bytes(state); }
};

}  // namespace mru::softmax
