// The CPU kernels of one cell, for one dtype and one choice of given and per-channel inputs.
#pragma once
#include "../../scan.h"

namespace mru {

// Steps [begin, end) of one sequence, which one call of a kernel scans.
struct Segment {
  int64_t batch, sequence;  // the batch row that contains the sequence; the number of the sequence
  int64_t start, length;    // scan position of its first step in that row; its number of steps
  int64_t word;             // the row of `codes` with its first word
  int64_t begin, end;
  bool resets = false;  // whether the state that enters `begin` is the reset state
};

// One affine map a channel, s -> a s + b (maps/affine.h): rows [n] in the state dtype.
struct MapRow {
  void *a, *b;
};

// A kernel works on channels [d0, d1) of a segment, n = d1 - d0. Rows are [n] in the state dtype unless a comment says
// otherwise.
struct Kernels {
  int inputs;
  unsigned channels;                // bit i: input i comes per channel
  bool adjoint_sees_state;          // Cell::kAdjointSeesState
  bool (*overwrites)(const Scan&);  // Cell::kOverwrites and overwrites()

  // Writes h and the checkpoints. carry: the state before the segment -> the state after it. The steps come from the
  // streams; from the packed codes; or from the streams, and their codes are packed.
  void (*forward)(const Scan&, const Segment&, int64_t d0, int64_t d1, void* carry);
  void (*forward_from_codes)(const Scan&, const Segment&, int64_t d0, int64_t d1, void* carry);
  void (*forward_to_codes)(const Scan&, const Segment&, int64_t d0, int64_t d1, void* carry);

  // The next two are null for a cell that does not compose (cell.h): its segments are whole sequences.
  // `map` becomes: map, then the segment as one map of the state. Packs the codes if scan.codes is given. `late`: a row
  // in the real dtype of the state (`recent` of maps/cut.h), or null: not wanted.
  void (*summarize)(const Scan&, const Segment&, int64_t d0, int64_t d1, MapRow map, void* late);
  // The same for m = dL/ds, right to left. If adjoint_sees_state: the factor only, and `late` becomes 0.
  void (*summarize_adjoint)(const Scan&, const Segment&, int64_t d0, int64_t d1, MapRow map, void* late);

  // Writes the gradients of the streams. carry: m from the right -> m to the left.
  //   sums     [2 k, stride] for the k inputs that come per channel: adds each gradient summed over time, then what each
  //            of these sums has lost (Sum of sum.h)
  //   scratch  scratch_rows(chunk) rows
  //   late     as for summarize_adjoint; written only if adjoint_sees_state
  void (*backward)(const Scan&, const Segment&, int64_t d0, int64_t d1, void* carry, void* sums, int64_t stride,
                   void* scratch, void* late);
  // Adds m to the compensated sum in `sum` and `lost`, unless these are null, and sets it to 0.
  void (*take)(int64_t n, void* m, void* sum, void* lost);
  // total [n] = the sum over r < rows of the compensated sums at sums + r stride. `to_lost`: from a sum to what it lost.
  void (*reduce)(int64_t n, int64_t rows, int64_t stride, int64_t to_lost, const void* sums, void* total);

  // state [D]: the initial state -> the state that enters a sequence with steps.
  void (*enter)(const Scan&, void* state);
  void (*fill_ones)(int64_t n, void* row);

  // Maps of whole rows. `overwrites`: factors are 0 or 1, and a factor 0 drops the state, NaN included.
  void (*identity)(int64_t n, MapRow map);
  void (*head)(int64_t n, const void* state, MapRow map);      // drops any state, NaN included (Affine::head)
  void (*constant)(int64_t n, const void* state, MapRow map);  // the same for maps that overwrite
  void (*apply)(int64_t n, bool overwrites, MapRow map, void* state);
  void (*then)(int64_t n, MapRow total, MapRow next);  // total becomes: total, then next
  // For maps that overwrite: `near` becomes `far`, then `near`, in channels that `near` does not settle alone. Returns whether
  // a channel is not settled yet.
  bool (*look_through)(int64_t n, MapRow far, MapRow near);
  // Whether the state `exit` that a segment leaves is the state that the next one was given (maps/cut.h).
  bool (*consistent)(int64_t n, bool overwrites, MapRow map, const void* late, const void* entry, const void* exit,
                     const void* next);
  // A state becomes NaN where `earlier` is. Returns whether one changed.
  bool (*absorb)(int64_t n, const void* earlier, void* state);
};

// For `backward`: the states of a chunk, before its first step and after each; a partial sum for each input.
constexpr int64_t scratch_rows(int64_t chunk) { return chunk + 1 + kMaxInputs; }

enum class Isa { kBaseline, kAvx2, kAvx512 };
// The kernels of cell C for one instruction set, for the dtype and inputs of a scan.
template <Isa, class C>
const Kernels& kernels(const Scan&);

}  // namespace mru
