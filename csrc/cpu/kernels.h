// The CPU kernels of one cell variant and element type, compiled once per instruction set and cell.
#pragma once
#include "../scan.h"

namespace mru {

// Steps [begin, end) of one sequence: what one call of a kernel scans. `begin` is a multiple of the chunk.
struct Piece {
  int64_t batch, sequence;  // the batch row that holds the sequence; which sequence
  int64_t start, length;    // scan position of its first step in that row; its steps
  int64_t word;             // the row of `events` that holds its first word
  int64_t begin, end;
};

// Each works on channels [d0, d1) of a piece. Rows are [d1 - d0] in the state dtype; `carry` is updated in place.
struct Kernels {
  // h, checkpoints; carry: state before -> state after. From the streams; from the packed events; or from the streams,
  // packing the events.
  void (*forward)(const Scan&, const Piece&, int64_t d0, int64_t d1, void* carry);
  void (*forward_from_events)(const Scan&, const Piece&, int64_t d0, int64_t d1, void* carry);
  void (*forward_to_events)(const Scan&, const Piece&, int64_t d0, int64_t d1, void* carry);
  // The piece as one map s -> factor s + offset; packs the events where scan.events is given. `late` (csrc/cells/cut.h) is
  // a row of the real dtype of states, or null: not wanted.
  void (*summarize)(const Scan&, const Piece&, int64_t d0, int64_t d1, void* factor, void* offset, void* late);
  // The same for the adjoint, right to left: m -> factor m + offset, where m = a lambda of the step to the right.
  void (*summarize_adjoint)(const Scan&, const Piece&, int64_t d0, int64_t d1, void* factor, void* offset, void* late);
  // Gradients; carry: m from the right -> m to the left. `sums` [2 (1 + inputs)][stride] collects what is summed over
  // time: alpha's gradient, then each per-channel input's; then what each of these sums has lost (Sum, lanes.h).
  // `scratch` holds scratch_rows(chunk) rows.
  void (*backward)(const Scan&, const Piece&, int64_t d0, int64_t d1, void* carry, void* sums, int64_t stride,
                   void* scratch);
  // state -> factor state + offset over n channels; if `forgets`, a factor 0 gives the offset even for an infinite or NaN state.
  void (*apply)(int64_t n, const void* factor, const void* offset, bool forgets, void* state);
  // Whether the state `exit` that a piece leaves is the one that was handed to the next piece (csrc/cells/cut.h).
  bool (*consistent)(int64_t n, bool forgets, const void* factor, const void* offset, const void* late,
                     const void* entry, const void* exit, const void* next);
  // For maps that hold (factor 1) or forget (0): looks through a map, where it holds, at the one before it. Returns
  // whether a channel still holds. Null for cells without such maps.
  bool (*behind)(int64_t n, const void* earlier_factor, const void* earlier_offset, void* factor, void* offset);
  // The same for those of the adjoint, at the map after it.
  bool (*ahead)(int64_t n, const void* later_factor, const void* later_offset, void* factor, void* offset);
  // A state becomes NaN where an earlier one is. Returns whether it changed.
  bool (*absorb)(int64_t n, const void* earlier, void* state);
  // The state that enters a sequence; where `poison`, NaN in a channel whose alpha is NaN.
  void (*enter)(const Scan&, int64_t sequence, bool poison, void* state);
  // total[j] = the sum over r, in order, of the `sums` [2 (1 + inputs)][n] at r stride, of their first row.
  void (*reduce)(int64_t rows, int64_t n, int64_t stride, const void* sums, void* total);
};

constexpr int64_t scratch_rows(int64_t chunk) { return chunk + 1 + 1 + kMaxInputs; }

enum class Isa { kBaseline, kAvx2, kAvx512 };
// Those of a cell for one instruction set, for the dtype and inputs of a scan.
template <Isa, CellKind>
const Kernels& kernels(const Scan&);

}  // namespace mru
