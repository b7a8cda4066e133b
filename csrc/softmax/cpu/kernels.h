// The CPU kernels of the softmax recurrence, for one dtype and one choice of decay and bonus.
#pragma once
#include "../../cpu/kernels/kernels.h"
#include "../scan.h"

namespace mru::softmax {

// A kernel works on the heads [h0, h1) of a segment and on their channels. Rows are in the state dtype: `state` [D + 2 H] is
// mean | Z | z, `map` [D + 3 H] has the sum of the decays, too, and `adjoint` [D + 2 H] is dL/dmean | dL/dZ | unused.
// `scratch` has scratch_elements(...) elements of the state dtype.
struct HeadKernels {
  // Writes y and the borders. `state`: before the segment -> after it.
  void (*forward)(const HeadScan&, const Segment&, int64_t h0, int64_t h1, void* state, void* scratch);
  // `map` becomes the segment's map; or only its sum of decays.
  void (*summarize)(const HeadScan&, const Segment&, int64_t h0, int64_t h1, void* map, void* scratch);
  void (*sum_decays)(const HeadScan&, const Segment&, int64_t h0, int64_t h1, void* map);
  // Writes the gradients of the streams. `adjoint`: from the right of the segment -> to its left. `sums` [4, H]: adds the
  // gradients of a decay and a bonus [H], each a sum and what it lost (sum.h).
  void (*backward)(const HeadScan&, const Segment&, int64_t h0, int64_t h1, void* adjoint, void* sums, void* scratch);

  // Rows of all heads. `state` becomes: state, then map.
  void (*carry)(const HeadScan&, const void* map, void* state);
  // `adjoint` from the right of a segment becomes that to its left. `start`, `end`: the states around the segment; `offset`:
  // the adjoint to its left if that from the right is 0.
  void (*carry_adjoint)(const HeadScan&, const void* map, const void* start, const void* end, const void* offset,
                        void* adjoint);
  // total [H]: the sums over `count` rows [4, H] of the gradients of the decay (`which` 0) or the bonus (2).
  void (*total)(const HeadScan&, const void* sums, int64_t count, int which, void* total);
};

// Steps of one vector before the next in the forward pass, which prefetches as many rows ahead; and steps of the backward pass
// between two flushes of HeadGradients.
constexpr int64_t kTile = 8;
constexpr int64_t kMostLanes =
    16;  // of a vector; sums over a head's channels have as many parts on every instruction set
constexpr int64_t kHeadRows = 5;  // of a step in the backward pass: see Records in backward.h

// Elements of scratch that a kernel needs for a block of heads.
inline int64_t scratch_elements(const HeadScan& scan, int64_t heads) {
  const int64_t chunk = scan.chunk < scan.time ? scan.chunk : scan.time;
  const int64_t forward = (4 + 2 * kTile) * heads;
  // In the backward pass channels that are heads are scanned a vector at a time.
  const bool own = scan.channels == scan.heads;
  const int64_t backward = own ? ((kHeadRows + 1) * chunk + 1) * kMostLanes
                               : ((kHeadRows + 3) * chunk + 2) * heads + (4 * chunk + 1) * kMostLanes;
  return forward > backward ? forward : backward;
}

template <Isa>
const HeadKernels& head_kernels(const HeadScan&);

}  // namespace mru::softmax
