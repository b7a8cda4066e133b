// The segment that each C++ backend chooses for a call. It is a function of sizes only, so results depend neither on the
// device nor on the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>

namespace mru {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kSegmentUnit = 64;  // segments are multiples of the default chunk

// The sizes of a call. `steps` is the total over all sequences, `itemsize` the bytes of an element of a stream.
struct Sizes {
  int64_t sequences, steps, channels, itemsize;
};

namespace cpu {

// The segment in steps; 0 to scan each sequence as a whole.
constexpr int64_t segment(const Sizes& n) {
  constexpr int64_t kBlock = 64;     // channels that keep one thread busy
  constexpr int64_t kEnough = 16;    // units of work (sequences x blocks); time is cut only below this number
  constexpr int64_t kSegments = 64;  // most segments of a sequence
  constexpr int64_t kLeast = 512;    // least steps of a segment
  const int64_t blocks = ceil_div(n.channels, kBlock), units = n.sequences * blocks;
  if (units >= kEnough || units == 0 || n.steps < 2 * kLeast * n.sequences) return 0;
  return ceil_div(std::max(n.steps * blocks / kSegments, kLeast), kSegmentUnit) * kSegmentUnit;
}

}  // namespace cpu

namespace cuda {

constexpr int64_t segment(const Sizes& n) {
  constexpr int64_t kWord = 16;         // bytes that a thread moves at once
  constexpr int64_t kEnough = 1 << 11;  // words in a time step of all sequences; time is cut only below this number
  constexpr int64_t kMost = 1 << 15;    // most threads if time is cut: eight warps per multiprocessor of an H100
  constexpr int64_t kFew = 4 * kSegmentUnit;  // sequences with fewer steps are not cut
  const int64_t words = ceil_div(n.channels * n.itemsize, kWord), in_step = n.sequences * words;
  if (in_step >= kEnough || in_step == 0 || n.steps < kFew * n.sequences) return 0;
  return ceil_div(std::max(ceil_div(n.steps * words, kMost), kSegmentUnit), kSegmentUnit) * kSegmentUnit;
}

}  // namespace cuda
}  // namespace mru
