// What both sides of a launch agree on: how a Scan is cut into segments, and its workspace. Plain C++.
//
//   segment   scan positions that are scanned without the others: `scan.segment` steps of a batch row, in which several
//             packed sequences may begin and end; where time is not cut, a whole sequence
//   forward   uncut: `forward`, one pass over the streams.
//             cut: `summarize` each segment and write its codes; `carry`; `expand` the codes from the entry states. If
//             steps do not fit codes: `forward` from the entry states.
//   backward  uncut: `backward`, one pass.
//             cut: `summarize_adjoint` each segment, as far as to a write that overwrites; `carry`; `backward` from the
//             entry m. If the adjoint sees the state, the maps come from `summarize` (factors) and from `backward` with
//             m = 0 (offsets).
//   map       `summarize` each segment; `compose` the segments of a row.
//   resets    `mark_resets` first makes bits of the mask. The sums of m over the resets of a sequence that is cut are
//             added up by `reduce_taken`.
//   check     cut: whether every segment left what `carry` handed to the next one (maps/cut.h). The uncut kernels are
//             launched after it and return at once if it passed. A forward pass that only copies values needs neither.
#pragma once
#include <algorithm>

#include "../lanes.h"
#include "../scan.h"

namespace mru::cuda {

constexpr int64_t kMostSumRows = 8192;
constexpr int64_t kMostChunk = 64;  // the streams of a chunk lie in shared memory
constexpr int kSegmentStates = 5;   // factor, offset, late, entry, exit
constexpr int kResetGroup = 1024;   // steps of a group of bits that mark resets (resets.cuh)
constexpr int kResetWords = 33;     // words of a group

// Division of 0 <= n < 2^63 by a divisor that the host knows: a device's own 64-bit division is a call.
class Divisor {
 public:
  Divisor() = default;
  // magic = floor(2^(64 + shift) / divisor) + 1, 2^shift < divisor
  explicit Divisor(int64_t divisor) : divisor_(divisor) {
    while (shift_ < 62 && (int64_t(2) << shift_) < divisor) ++shift_;
    if (divisor > 1) magic_ = uint64_t((static_cast<unsigned __int128>(1) << (64 + shift_)) / uint64_t(divisor)) + 1;
  }
  MRU_INLINE int64_t operator()(int64_t n) const {
    if (magic_ == 0) return n;
#ifdef __CUDA_ARCH__
    return int64_t(__umul64hi(uint64_t(n), magic_) >> shift_);
#else
    return int64_t(uint64_t(static_cast<unsigned __int128>(uint64_t(n)) * magic_ >> 64) >> shift_);
#endif
  }

  MRU_INLINE int64_t divisor() const { return divisor_; }

 private:
  int64_t divisor_ = 1;
  uint64_t magic_ = 0;  // 0: divides by 1
  int shift_ = 0;
};

struct Plan {
  int64_t segments = 0;        // of all rows
  int64_t row_segments = 1;    // of a batch row; 1: time is not cut, whatever scan.segment says
  int64_t sum_rows = 0;        // segment i adds to row i % sum_rows of the sums over time and batch
  int sums = 0;                // of a row: gradients of the inputs that come per channel
  int64_t uncut_sum_rows = 0;  // sum_rows of the uncut form, used when it scans again
  int64_t states_bytes = 0;    // of one [segments, D] in the state dtype
  int64_t reset_groups = 0;    // of a row; 0: no resets
  Divisor row_divisor, chunk_divisor;

  Plan() = default;
  Plan(const Scan& scan, bool backward) {
    if (scan.segment > 0) row_segments = std::max<int64_t>(1, (scan.time + scan.segment - 1) / scan.segment);
    segments = is_cut() ? scan.batch * row_segments : scan.sequences;
    row_divisor = Divisor(row_segments), chunk_divisor = Divisor(scan.chunk);
    state_size_ = element_bytes(scan.state);
    states_bytes = aligned(segments * scan.channels * state_size_);
    if (scan.resets) reset_groups = (scan.time + kResetGroup - 1) / kResetGroup;
    resets_bytes_ = aligned(scan.batch * reset_groups * kResetWords * int64_t(sizeof(uint32_t)));
    if (!backward) return;
    if (is_cut() && scan.grad_reset_state) reset_grad_bytes_ = 2 * segments * scan.channels * state_size_;
    for (const Input& input : scan.in) sums += input.channel != nullptr;
    sum_rows = sums > 0 ? std::min(segments, kMostSumRows) : segments;
    uncut_sum_rows = std::min(scan.sequences, kMostSumRows);
    sums_bytes_ = aligned(std::max(sum_rows, uncut_sum_rows) * sums * scan.channels * state_size_);
  }

  MRU_INLINE bool is_cut() const { return row_segments > 1; }
  MRU_INLINE int64_t row_of(int64_t segment) const { return row_divisor(segment); }
  MRU_INLINE int64_t in_row(int64_t segment) const { return segment - row_of(segment) * row_segments; }
  // Layout: kSegmentStates arrays [segments, D], the flag, the rows of sums, the bits of resets, the sums over resets.
  int64_t workspace_bytes() const { return reset_grad_offset() + reset_grad_bytes_; }
  int64_t flag_offset() const { return kSegmentStates * states_bytes; }
  int64_t sums_offset() const { return is_cut() ? flag_offset() + 16 : 0; }
  int64_t resets_offset() const { return sums_offset() + sums_bytes_; }
  int64_t reset_grad_offset() const { return resets_offset() + resets_bytes_; }

 private:
  static int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
  int64_t state_size_ = 4, sums_bytes_ = 0, resets_bytes_ = 0, reset_grad_bytes_ = 0;
};

// Whether threads may move 16-byte words, `width` channels each: every row of every tensor starts on a word.
inline bool moves_words(const Scan& scan, int64_t width) {
  bool all = scan.channels % width == 0;
  const auto word = [&](const void* p) { all = all && reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const auto stream = [&](const Stream& s) {
    word(s.data);
    all = all && s.batch % width == 0 && s.time % width == 0;
  };
  stream(scan.h), stream(scan.grad_h);
  for (int i = 0; i < kMaxInputs; ++i) {
    stream(scan.in[i].stream), stream(scan.grad_in[i]);
    word(scan.in[i].channel), word(scan.grad_channel[i]);
  }
  for (const void* p : {scan.initial, scan.grad_final, scan.reset_state, scan.grad_checkpoints}) word(p);
  for (const void* p : {scan.final_state, scan.checkpoints, scan.grad_initial}) word(p);
  word(scan.codes);
  return all;
}

// Launches on a stream of the current device. They return null, or what CUDA says is wrong.
struct Kernels {
  const char* (*forward)(const Scan&, void* workspace, void* stream);
  const char* (*backward)(const Scan&, void* workspace, void* stream);
  // factor, offset: [sequences, D], state dtype
  const char* (*map)(const Scan&, void* factor, void* offset, void* workspace, void* stream);
};

// Those of one cell, C its declaration (cell.h), by the element type of its streams. Null where the cell takes none of
// it. scan.cu, compiled once per element type, defines them for every cell.
template <class C>
struct KernelsOf {
  static const Kernels float32, float64, bfloat16, float16, complex64, complex128;
};

template <class C>
const Kernels& kernels(Dtype dtype) {
  using Of = KernelsOf<C>;
  switch (dtype) {
    case Dtype::kFloat64: return Of::float64;
    case Dtype::kBFloat16: return Of::bfloat16;
    case Dtype::kFloat16: return Of::float16;
    case Dtype::kComplex64: return Of::complex64;
    case Dtype::kComplex128: return Of::complex128;
    default: return Of::float32;
  }
}

}  // namespace mru::cuda
