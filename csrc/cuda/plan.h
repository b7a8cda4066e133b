// What both sides of a launch agree on: how a Scan is cut into jobs, and its workspace. Plain C++.
//
//   job       scan positions that are scanned without others' help: a whole sequence, or, in the chunked form, one segment
//             of a batch row, in which several packed sequences may begin and end
//   forward   wide: `forward`, one pass over the streams.
//             chunked: `summarize` each job and pack its events, `carry`, `expand` the events from the entry states;
//             where steps do not fit events, `forward` from the entry states.
//   backward  wide: `backward`, one pass. chunked: `summarize_adjoint` each job, where a write forgets as far as to it;
//             `carry`; `backward` from the entry states of m.
//   check     chunked: whether every job left what `carry` handed to the next one (csrc/maps/cut.h). The wide form is
//             launched after it and returns at once if no check failed. A forward pass that only copies values needs neither.
#pragma once
#include <algorithm>

#include "../lanes.h"
#include "../scan.h"

namespace mru::cuda {

constexpr int64_t kMostSumRows = 8192;
constexpr int64_t kMostChunk = 64;  // the streams of a chunk lie in shared memory
constexpr int kJobStates = 5;       // factor, offset, late, entry, exit

// Division of 0 <= n < 2^63 by a divisor that a launch knows: a device's own 64-bit division is a call.
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
  int64_t segments = 1;  // of a batch row; 1: the wide form, whatever scan.segment says
  int64_t jobs = 0;
  int64_t sum_rows = 0;        // job j adds what is summed over time and batch to row j % sum_rows
  int sums = 0;                // of a row: alpha's gradient, then each per-channel input's
  int64_t whole_sum_rows = 0;  // sum_rows of the wide form, used when it scans again
  int64_t states_bytes = 0;    // of one [jobs, D] in the state dtype
  Divisor segments_divisor, chunk_divisor;

  Plan() = default;
  Plan(const Scan& scan, bool backward) {
    if (scan.segment > 0) segments = std::max<int64_t>(1, (scan.time + scan.segment - 1) / scan.segment);
    jobs = chunked() ? scan.batch * segments : scan.sequences;
    segments_divisor = Divisor(segments), chunk_divisor = Divisor(scan.chunk);
    state_size_ = state_bytes(scan.dtype);
    states_bytes = (jobs * scan.channels * state_size_ + 15) / 16 * 16;
    if (!backward) return;
    sum_rows = std::min(jobs, kMostSumRows);
    sums = 1;
    for (int i = 0; i < scan.inputs; ++i) sums += scan.in[i].channel != nullptr;
    if (sums == 1 && !scan.grad_alpha) sums = 0, sum_rows = jobs;
    whole_sum_rows = std::min(scan.sequences, kMostSumRows);
    sums_bytes_ = std::max(sum_rows, whole_sum_rows) * sums * scan.channels * state_size_;
  }

  MRU_INLINE bool chunked() const { return segments > 1; }
  // Layout: kJobStates arrays [jobs, D], the flag, the rows of sums.
  int64_t workspace_bytes() const { return sums_offset() + sums_bytes_; }
  int64_t flag_offset() const { return kJobStates * states_bytes; }
  int64_t sums_offset() const { return chunked() ? flag_offset() + 16 : 0; }

 private:
  int64_t state_size_ = 4, sums_bytes_ = 0;
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
  for (int i = 0; i < scan.inputs; ++i) {
    stream(scan.in[i].stream), stream(scan.grad_in[i]);
    word(scan.in[i].channel), word(scan.grad_channel[i]);
  }
  for (const void* p : {scan.alpha, scan.initial, scan.grad_final}) word(p);
  for (const void* p : {scan.final_state, scan.checkpoints, scan.grad_alpha, scan.grad_initial}) word(p);
  word(scan.events);
  return all;
}

// Launches on a stream of the current device; null, or what CUDA says is wrong. One pair an element type (scan.cu).
struct Kernels {
  const char* (*forward)(const Scan&, void* workspace, void* stream);
  const char* (*backward)(const Scan&, void* workspace, void* stream);
};
extern const Kernels kernels_float32, kernels_float64, kernels_bfloat16, kernels_float16, kernels_complex64,
    kernels_complex128;

inline const Kernels& kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return kernels_float64;
    case Dtype::kBFloat16: return kernels_bfloat16;
    case Dtype::kFloat16: return kernels_float16;
    case Dtype::kComplex64: return kernels_complex64;
    case Dtype::kComplex128: return kernels_complex128;
    default: return kernels_float32;
  }
}

}  // namespace mru::cuda
