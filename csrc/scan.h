// One call of an op as plain data: what the kernels of every backend are given. No torch in here.
//
//   B batch, T time, D channels     streams [B, T, D], unit stride on D, any element strides on B and T
//   sequence                        one run of the recurrence: a batch row, or one span of `offsets` (packed)
//   scan position                   0 is the first step scanned: time 0, or the last time step if `reverse`
//   chunk                           steps between two checkpoints, which are saved states
//   segment                         steps that are scanned in parallel with other segments; 0: sequences are whole, unless the
//                                   CPU cuts those whose writes overwrite the state
//   state dtype                     float for fp32, bf16 and fp16 streams, else the dtype of the streams; its complex
//                                   counterpart where a cell has complex states under real streams
#pragma once
#include <cstdint>

namespace mru {

constexpr int kMaxInputs = 4;      // array inputs of a cell
constexpr int kMaxScalars = 2;     // scalars of a cell
constexpr int kCodesPerWord = 16;  // write codes of 2 bits in an int32

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kComplex64, kComplex128 };

constexpr bool is_complex(Dtype dtype) { return dtype == Dtype::kComplex64 || dtype == Dtype::kComplex128; }

// Bytes of an element of a stream or a state.
constexpr int64_t element_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBFloat16:
    case Dtype::kFloat16: return 2;
    case Dtype::kFloat32: return 4;
    case Dtype::kFloat64:
    case Dtype::kComplex64: return 8;
    case Dtype::kComplex128: return 16;
  }
  return 0;
}

struct Stream {
  void* data = nullptr;
  int64_t batch = 0, time = 0;  // strides in elements
};

// An array input comes as a stream or as one value per channel, [D] in the state dtype. Neither: it is not given.
struct Input {
  Stream stream;
  const void* channel = nullptr;
};

struct Scan {
  Dtype dtype, state;                // of the streams; of the states
  Input in[kMaxInputs];              // in the order of the cell's kInputs
  double scalars[kMaxScalars] = {};  // in the order of the cell's scalars

  int64_t batch = 0, time = 0, channels = 0;
  int64_t sequences = 0;
  const int64_t* offsets = nullptr;  // [sequences + 1], or null: one sequence a batch row. CPU: on the host
  bool reverse = false;
  int64_t chunk = 0, segment = 0;
  bool non_temporal = false;  // CPU: whether results may be stored by non-temporal stores (cpu/plan.h)

  const void* initial = nullptr;  // [sequences, D] state dtype, or null: zeros

  // Where `resets` is true the state becomes `reset_state` before the step, in scan order.
  const bool* resets = nullptr;       // [B, T], contiguous, or null: none
  const void* reset_state = nullptr;  // [sequences, D] state dtype, or null: zeros

  // A step on states in slots: sequence n has row slots[n] of `initial` and `final_state`, one tensor [slot_count, D]. If
  // the row is not in [0, slot_count), the sequence is skipped: its h is 0. Null: sequence n has row n.
  const int64_t* slots = nullptr;  // [sequences]. CPU: on the host
  int64_t slot_count = 0;

  // Forward results. Row k of `checkpoints` is the state that enters the chunk at scan position (k + 1) chunk,
  // before a reset there; for packed sequences the position floor(start / chunk) of the chunk's first step (no two
  // sequences share a row).
  Stream h;
  void* final_state = nullptr;  // [sequences, D] state dtype
  void* checkpoints = nullptr;  // [B, checkpoint_rows, D] state dtype, or null: not saved
  int32_t* codes = nullptr;     // [B, code_rows, D] write codes, or null: not packed
  bool save = false;            // whether the backward pass is given these codes
  int64_t checkpoint_rows = 0, code_rows = 0;

  // Backward: given, and results. Null: not wanted.
  Stream grad_h;
  const void* grad_final = nullptr;        // [sequences, D] state dtype
  const void* grad_checkpoints = nullptr;  // as checkpoints
  Stream grad_in[kMaxInputs];
  void* grad_channel[kMaxInputs] = {};  // [D] state dtype, for inputs that come per channel
  unsigned wanted = ~0u;                // bit i: the caller needs grad_channel[i]; otherwise it may be zeros
  void* grad_initial = nullptr;         // [sequences, D] state dtype
  void* grad_reset_state = nullptr;     // [sequences, D] state dtype: summed over the resets of each sequence
};

}  // namespace mru
