#include "plan.h"

#include "../check.h"

namespace mru::cpu {

bool is_large(const Scan& scan) {
  int64_t streams = (scan.h.data != nullptr) + (scan.grad_h.data != nullptr);
  for (int i = 0; i < kMaxInputs; ++i)
    streams += (scan.in[i].stream.data != nullptr) + (scan.grad_in[i].data != nullptr);
  return streams * scan.batch * scan.time * scan.channels * element_bytes(scan.dtype) >= kLargeBytes;
}

void check_offsets(const Scan& scan) {
  if (!scan.offsets) return;
  constexpr const char* expected = "cu_seqlens: expected offsets that rise from 0 to the total length ";
  const int64_t first = scan.offsets[0], last = scan.offsets[scan.sequences];
  MRU_CHECK(first == 0 && last == scan.time, expected, scan.time, ", got ", first, " to ", last);
  for (int64_t n = 0; n < scan.sequences; ++n) {
    const int64_t begin = scan.offsets[n], end = scan.offsets[n + 1];
    MRU_CHECK(0 <= begin && begin <= end && end <= scan.time, expected, scan.time, ", got ", begin, " and ", end,
              " for sequence ", n);
  }
}

void check_slots(const Scan& scan) {
  if (!scan.slots) return;
  std::vector<bool> used(scan.slot_count);
  for (int64_t n = 0; n < scan.sequences; ++n) {
    const int64_t slot = scan.slots[n];
    MRU_CHECK(-1 <= slot && slot < scan.slot_count, "state_indices: expected -1 or a slot below ", scan.slot_count,
              ", got ", slot, " at index ", n);
    if (slot < 0) continue;
    MRU_CHECK(!used[slot], "state_indices: expected every slot once, got ", slot, " again at index ", n);
    used[slot] = true;
  }
}

Segments cut(const Scan& scan) {
  Segments segments;
  segments.first.reserve(scan.sequences + 1);
  for (int64_t n = 0; n < scan.sequences; ++n) {
    segments.first.push_back(segments.count());
    Segment segment{.batch = n, .sequence = n, .start = 0, .length = scan.time, .word = 0, .begin = 0, .end = 0};
    if (scan.offsets) {
      const int64_t begin = scan.offsets[n], end = scan.offsets[n + 1];
      segment.batch = 0;
      segment.start = scan.reverse ? scan.time - end : begin;
      segment.length = end - begin;
      // Words are not shared: a sequence takes at most one word more than its share of whole ones.
      segment.word = segment.start / kCodesPerWord + (scan.reverse ? scan.sequences - 1 - n : n);
    }
    const int64_t most = scan.segment > 0 ? scan.segment : segment.length;
    for (; segment.begin < segment.length; segment.begin = segment.end) {
      segment.end = std::min(segment.begin + most, segment.length);
      segments.list.push_back(segment);
    }
  }
  segments.first.push_back(segments.count());
  return segments;
}

ResetStates::ResetStates(const Scan& scan, const Kernels& kernels) : rows_(scan, scan.resets ? scan.sequences : 0) {
  for (int64_t n = 0; scan.resets && n < scan.sequences; ++n) {
    void* const state = rows_.at(n);
    if (scan.reset_state)
      std::memcpy(state, static_cast<const char*>(scan.reset_state) + n * row_bytes(scan), row_bytes(scan));
    kernels.enter(scan, state);
  }
}

Ones::Ones(Scan& scan, const Kernels& kernels) {
  for (int i = 0; i < kernels.inputs; ++i) {
    if ((kernels.channels >> i & 1) == 0 || scan.in[i].channel) continue;
    if (row_.empty()) {
      row_.resize(row_bytes(scan));
      kernels.fill_ones(scan.channels, row_.data());
    }
    scan.in[i].channel = row_.data();
  }
}

}  // namespace mru::cpu
