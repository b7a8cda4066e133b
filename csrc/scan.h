// One scan call as plain data: what every backend's kernels are given. No torch in here.
//
//   B batch, T time, D channels     streams [B, T, D], unit stride on D, any element strides on B and T
//   sequence                        one run of the recurrence: a batch row, or one span of `offsets` (packed)
//   scan position                   0 is the first step scanned: time 0, or the last time step when `reverse`
//   chunk                           steps between two saved boundary states
//   segment                         steps that one unit scans while other units scan the same sequence; 0: no split
//   state dtype                     float for fp32, bf16 and fp16 streams, else the streams'
#pragma once
#include <cstdint>

namespace mru {

constexpr int kMaxInputs = 3;       // gate inputs of a cell
constexpr int kEventsPerWord = 16;  // 2 bits each in an int32

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kComplex64, kComplex128 };
enum class CellKind { kBmru, kSchmitt, kLinear };

constexpr bool is_complex(Dtype dtype) { return dtype == Dtype::kComplex64 || dtype == Dtype::kComplex128; }

// Bytes of an element of a stream, and of a state.
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
constexpr int64_t state_bytes(Dtype dtype) { return element_bytes(dtype) < 4 ? 4 : element_bytes(dtype); }

// Whether a cell takes streams of a dtype, so many inputs, and some of them per channel (bit i: input i).
constexpr bool takes(CellKind cell, Dtype dtype, int inputs, unsigned per_channel) {
  if (is_complex(dtype) && cell != CellKind::kLinear) return false;
  switch (cell) {
    case CellKind::kBmru: return (inputs == 2 || inputs == 3) && (per_channel & ~2u) == 0;
    case CellKind::kSchmitt: return inputs == 3 && per_channel == 6u;
    case CellKind::kLinear: return inputs == 2 && (per_channel & ~2u) == 0;
  }
  return false;
}

// Whether a step of the cell fits a 2-bit event: hold, one of two writes, NaN.
constexpr bool has_events(CellKind cell, int inputs) {
  switch (cell) {
    case CellKind::kBmru: return inputs == 2;  // an amplitude is written as it comes
    case CellKind::kSchmitt: return true;
    case CellKind::kLinear: return false;
  }
  return false;
}

struct Stream {
  void* data = nullptr;
  int64_t batch = 0, time = 0;  // strides in elements
};

// A gate input comes as a stream, or as one value per channel in the state dtype.
struct Input {
  Stream stream;
  const void* channel = nullptr;
};

struct Scan {
  CellKind cell;
  Dtype dtype;
  int inputs = 0;
  Input in[kMaxInputs];

  int64_t batch = 0, time = 0, channels = 0;
  int64_t sequences = 0;
  const int64_t* offsets = nullptr;  // [sequences + 1] on the host, or null: one sequence a batch row
  bool reverse = false;
  int64_t chunk = 0, segment = 0;
  double epsilon = 0, surrogate_scale = 1;

  const void* alpha = nullptr;    // [D] state dtype, or null: ones; never given beside complex streams
  const void* initial = nullptr;  // [sequences, D] state dtype, or null: zeros

  // Forward results. Row k of `checkpoints` is the state that enters the chunk at scan position (k + 1) chunk,
  // for packed sequences the position floor(start / chunk) of the chunk's first step (unique, see Piece).
  Stream h;
  void* final_state = nullptr;  // [sequences, D] state dtype
  void* checkpoints = nullptr;  // [B, checkpoint_rows, D] state dtype, or null: not saved
  int32_t* events = nullptr;    // [B, event_rows, D], or null: not packed
  bool save = false;            // whether the backward pass is given these events
  int64_t checkpoint_rows = 0, event_rows = 0;

  // Backward: given, and results. Null: not wanted.
  Stream grad_h;
  const void* grad_final = nullptr;  // [sequences, D] state dtype
  Stream grad_in[kMaxInputs];
  void* grad_channel[kMaxInputs] = {};  // [D] state dtype, for inputs that come per channel
  void* grad_alpha = nullptr;           // [D] state dtype
  void* grad_initial = nullptr;         // [sequences, D] state dtype
};

}  // namespace mru
