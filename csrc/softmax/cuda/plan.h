// What both sides of a launch agree on: how a call is cut into segments, which threads have which channels, and the
// workspace. Plain C++. Not yet run on a GPU.
//
//   segment   positions of a sequence that are scanned without the others: all, or where time is cut scan.segment steps
//             from the sequence's start on. The segments of packed sequence n are numbered from n + offset / scan.segment
//             on, which leaves room for any offsets. A number that no sequence uses is a segment without steps
//   part      of a head: up to a warp of threads, side by side, W channels each. Its sums over channels are shuffles
//   forward   uncut: `forward`. Cut: `summarize` each segment; `carry` gives the state that enters each; `forward`
//   backward  uncut: `backward`. Cut: `backward` of each segment from 0, which stores no gradients of streams;
//             `carry_adjoint` gives what enters each from the right; `backward`. Then `add_parts` where a head has several
//             parts, and `reduce` for gradients [H]
#pragma once
#include <bit>

#include "../../cuda/plan.h"
#include "../../segment.h"
#include "../scan.h"

namespace mru::softmax::cuda {

using mru::cuda::Divisor;

constexpr int64_t kMostChunk = 64;  // the streams of a chunk lie in shared memory
constexpr int64_t kWarp = 32;

// The segment that the backend chooses, as mru::cuda::segment, for threads with 4 bytes of a row each. Not measured yet.
constexpr int64_t segment(const Sizes& n) {
  constexpr int64_t kEnough = 1 << 14;  // threads; time is cut only below this number
  constexpr int64_t kMost = 1 << 16;    // most threads if time is cut
  constexpr int64_t kFew = 4 * kSegmentUnit;
  const int64_t across = ceil_div(n.channels * n.itemsize, 4), threads = n.sequences * across;
  if (threads >= kEnough || threads == 0 || n.steps < kFew * n.sequences) return 0;
  return ceil_div(std::max(ceil_div(n.steps * across, kMost), kSegmentUnit), kSegmentUnit) * kSegmentUnit;
}

struct Plan {
  int64_t row_segments = 1, segments = 0;  // of a batch row; of the call
  int64_t steps = 1;                       // of a segment; more than there are if time is not cut
  int64_t group = 1, columns = 0;          // channels of a head; columns of a state: mean | Z | z
  int64_t threads = 1, parts = 1;          // of a head; if a thread has several heads, of those
  int lanes = 1, first_shuffle = 0;        // threads of a part; the power of two, at least half of them, of its sums
  int64_t warps = 0;                       // of a segment, where heads have several channels
  Divisor row_divisor, steps_divisor, chunk_divisor;  // by row_segments; by steps; by the chunk
  Divisor across;                                     // by the threads or warps of a segment

  // width: channels of a thread
  Plan(const HeadScan& scan, bool backward, int width) : group(scan.channels / std::max<int64_t>(scan.heads, 1)) {
    if (scan.segment > 0 && scan.sequences > 0) row_segments = std::max<int64_t>(1, ceil_div(scan.time, scan.segment));
    steps = is_cut() ? scan.segment : scan.time + 1;
    segments = scan.offsets ? scan.sequences + scan.time / steps : scan.sequences * row_segments;
    columns = scan.channels + 2 * scan.heads;
    row_divisor = Divisor(row_segments), steps_divisor = Divisor(steps), chunk_divisor = Divisor(scan.chunk);
    if (group > 1) {
      threads = group / width;
      parts = ceil_div(threads, kWarp);
      lanes = int(ceil_div(threads, parts));
      first_shuffle = int(std::bit_ceil(unsigned(lanes)) / 2);
      warps = ceil_div(scan.heads * parts, kWarp / lanes);
    }
    across = Divisor(std::max<int64_t>(group > 1 ? warps : scan.channels / width, 1));
    const int64_t size = scan.state_bytes(), heads = scan.heads;
    const auto place = [&](int64_t elements) {
      const int64_t at = bytes_;
      bytes_ += ceil_div(elements * size, 16) * 16;
      return at;
    };
    if (is_cut()) {
      decays = place(segments * heads);
      first = place(segments * (backward ? scan.channels : columns));
      second = place(segments * (backward ? scan.channels : columns));
    }
    if (!backward) return;
    for (const Input& input : scan.in) sums += input.channel != nullptr;
    sum_rows = segments * parts;
    sums_at = place(sum_rows * sums * heads);
    if (parts == 1) return;
    of_score = place(parts * scan.batch * scan.time * heads);
    if (scan.in[kDecay].stream.data) of_decay = place(parts * scan.batch * scan.time * heads);
    of_initial = place(parts * scan.sequences * heads);
  }

  MRU_INLINE bool is_cut() const { return row_segments > 1; }
  int64_t workspace_bytes() const { return bytes_; }

  // Places in the workspace, in bytes. Forward: first, the summaries of segments, second, the states that enter them, both
  // [segments, columns]. Backward: first, dL/dmean of what enters a segment from the right, and before `carry_adjoint` what a
  // segment makes of 0; second, dL/dZ, in any shares of a head's channels; both [segments, D]. decays: [segments, H].
  int64_t decays = 0, first = 0, second = 0;
  int64_t sums_at = 0, sum_rows = 0;                   // [sum_rows, sums, H]
  int sums = 0;                                        // gradients [H]
  int64_t of_score = 0, of_decay = 0, of_initial = 0;  // [parts, B T, H], [parts, B T, H], [parts, sequences, H]

 private:
  int64_t bytes_ = 0;
};

// Launches on a stream of the current device. They return null, or what CUDA says is wrong.
struct Kernels {
  int64_t (*workspace_bytes)(const HeadScan&, bool backward);
  const char* (*forward)(const HeadScan&, void* workspace, void* stream);
  const char* (*backward)(const HeadScan&, void* workspace, void* stream);
};
// By the element type of the streams; softmax.cu, compiled once per type, defines them.
extern const Kernels float32, float64, bfloat16, float16;

inline const Kernels& kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return float64;
    case Dtype::kBFloat16: return bfloat16;
    case Dtype::kFloat16: return float16;
    default: return float32;
  }
}

}  // namespace mru::softmax::cuda
