// Where states are reset, as bits in scan order: `mark_resets` makes them from the mask, and the other kernels look for
// the next reset in them, so the mask is read once per step and row.
//
//   group   kResetGroup steps of a row, aligned: a word with a bit for each of its words of steps that is not 0, then
//           those words, a bit for each step
#pragma once
#include "call.cuh"

namespace mru::cuda {

constexpr int kResetWord = 32;  // steps of a word

// The bits of one row.
class ResetBits {
 public:
  __device__ __forceinline__ ResetBits(const Plan& plan, const uint32_t* bits, int64_t row)
      : groups_(bits + row * plan.reset_groups * kResetWords) {}

  // The first reset in [from, end); `end` if there is none.
  __device__ __forceinline__ int64_t next(int64_t from, int64_t end) const {
    if (from >= end) return end;
    int64_t word = from / kResetWord;
    uint32_t bits = steps(word) & ~0u << (from % kResetWord);
    if (bits == 0) {
      int64_t group = from / kResetGroup;
      uint32_t words = words_of(group) & ~1u << (word % kResetWord);
      while (words == 0) {
        if (++group * kResetGroup >= end) return end;
        words = words_of(group);
      }
      word = group * kResetWord + first(words);
      bits = steps(word);
    }
    const int64_t found = word * kResetWord + first(bits);
    return found < end ? found : end;
  }
  // The last reset in [begin, before); begin - 1 if there is none.
  __device__ __forceinline__ int64_t previous(int64_t before, int64_t begin) const {
    if (before <= begin) return begin - 1;
    const int64_t from = before - 1;
    int64_t word = from / kResetWord;
    uint32_t bits = steps(word) & ~0u >> (kResetWord - 1 - from % kResetWord);
    if (bits == 0) {
      int64_t group = from / kResetGroup;
      uint32_t words = words_of(group) & ~(~0u << (word % kResetWord));
      while (words == 0) {
        if (group-- * kResetGroup <= begin) return begin - 1;
        words = words_of(group);
      }
      word = group * kResetWord + last(words);
      bits = steps(word);
    }
    const int64_t found = word * kResetWord + last(bits);
    return found >= begin ? found : begin - 1;
  }

 private:
  static __device__ __forceinline__ int first(uint32_t bits) { return kResetWord - 1 - __clz(int(bits & (0 - bits))); }
  static __device__ __forceinline__ int last(uint32_t bits) { return kResetWord - 1 - __clz(int(bits)); }
  __device__ __forceinline__ uint32_t words_of(int64_t group) const {
    return load<Traffic::kIndex, 1>(groups_ + group * kResetWords).at[0];
  }
  __device__ __forceinline__ uint32_t steps(int64_t word) const {
    return load<Traffic::kIndex, 1>(groups_ + word / kResetWord * kResetWords + 1 + word % kResetWord).at[0];
  }

  const uint32_t* const groups_;
};

// A block for a group; a thread for a step, a warp for a word. Words after the row's last step are not written.
[[maybe_unused]] static __global__ void __launch_bounds__(kResetGroup)
    mark_resets(const __grid_constant__ Scan scan, uint32_t* bits, Divisor row_groups) {
  const int64_t row = row_groups(blockIdx.x), group = blockIdx.x - row * row_groups.divisor();
  const int64_t position = group * kResetGroup + threadIdx.x;
  const int lane = int(threadIdx.x) % kResetWord, warp = int(threadIdx.x) / kResetWord;
  uint32_t* const words = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* const to = bits + int64_t(blockIdx.x) * kResetWords;
  bool reset = false;
  if (position < scan.time) {
    const int64_t t = scan.reverse ? scan.time - 1 - position : position;
    const auto* const mask = reinterpret_cast<const unsigned char*>(scan.resets);
    reset = load<Traffic::kMask, 1>(mask + row * scan.time + t).at[0] != 0;
  }
  const uint32_t word = __ballot_sync(~0u, reset);
  if (lane == 0) {
    words[warp] = word;
    if (group * kResetGroup + warp * kResetWord < scan.time)
      store<Traffic::kIndex>(to + 1 + warp, Vector<uint32_t, 1>{{word}});
  }
  __syncthreads();
  if (warp != 0) return;
  const uint32_t any = __ballot_sync(~0u, lane * kResetWord < int(blockDim.x) && words[lane] != 0);
  if (lane == 0) store<Traffic::kIndex>(to, Vector<uint32_t, 1>{{any}});
}

}  // namespace mru::cuda
