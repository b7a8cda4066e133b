// The forward kernel: time is the outer loop and the state is a row in the first-level cache.
#pragma once
#include "rows.h"

namespace mru {
namespace {

enum class Codes { kNone, kRead, kPack };

template <class F, Codes kCodes, int kTile>
void forward_by(const Scan& scan, const Segment& segment, int64_t d0, int64_t d1, void* carry) {
  using Value = typename F::Value;
  using Word = typename F::Word;
  const typename F::Cell cell(scan.scalars);
  const int64_t n = d1 - d0;
  auto* const state = static_cast<typename F::S*>(carry);
  CarriedRow<F> carried(state, n);
  Word last_word{};  // as CarriedRow::last
  if constexpr (kCodes == Codes::kPack) last_word = last_word_before<F>(scan, segment, d0, n);
  Inputs<F> in(scan, segment, segment.begin, d0);
  ResultRow<F, kTile> h(scan, scan.h, segment, segment.begin, d0, n);
  for (int64_t step = segment.begin; step < segment.end;) {
    const int64_t steps = tile_of<kTile>(step, segment.end);
    int32_t* const words = kCodes == Codes::kNone ? nullptr : word_row(scan, segment, step, d0);
    for_lanes<F>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
      const InputLanes<F, L> inputs(in, lanes, j);
      Value s = carried.get(lanes, state + j);
      Word word{};
      if constexpr (kCodes == Codes::kRead) word = load_word<F>(lanes, words + j) >> shift_of(step);
      if constexpr (kCodes == Codes::kPack)
        if (shift_of(step) != 0) word = L::kFull ? load_word<F>(lanes, words + j) : last_word;
      for (int64_t i = 0; i < steps; ++i) {
        Value x[F::kInputs], after;
        if constexpr (kCodes == Codes::kRead) {
          inputs.load_channels(x);
          after = cell.step_code(word & kCodeMask, s);
          word >>= 1;
        } else {
          inputs.load_at(i, x);
          if constexpr (kTile == 1) inputs.prefetch(kRowsAhead);
          after = cell.step(x, s);
          if constexpr (kCodes == Codes::kPack) word |= cell.encode(x) << shift_of(step + i);
        }
        if constexpr (kTile == 1) h.template prefetch<3>(kRowsAhead, j);
        h.put(lanes, i, j, cell.output(x, s, after));
        s = after;
      }
      carried.put(lanes, state + j, s);
      if constexpr (kCodes == Codes::kPack) store_word<F>(lanes, words + j, word, last_word);
    });
    in.advance(steps);
    h.advance(steps);
    step += steps;
    if (scan.checkpoints && is_boundary(scan, segment, step))
      __builtin_memcpy(boundary_row<typename F::S>(scan, scan.checkpoints, segment, step, d0), state,
                       n * sizeof(typename F::S));
  }
}

template <class F, Codes kCodes>
void forward(const Scan& scan, const Segment& segment, int64_t d0, int64_t d1, void* carry) {
  with_tile(d1 - d0, [&]<int kTile>() { forward_by<F, kCodes, kTile>(scan, segment, d0, d1, carry); });
}

}  // namespace
}  // namespace mru
