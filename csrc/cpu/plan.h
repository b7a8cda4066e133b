// How a scan is cut into segments and blocks of channels, and the memory of their rows.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../segment.h"
#include "../torch/tensors.h"
#include "kernels/kernels.h"

namespace mru::cpu {

constexpr int64_t kBlockBytes = 4096;         // of one row of a block: wider blocks use memory bandwidth better
constexpr int64_t kLeastBlockBytes = 256;     // of a block that is narrower for the sake of the threads
constexpr int64_t kSerialElements = 1 << 15;  // below this, threads cost more than they bring
constexpr int64_t kLargeBytes = 1 << 27;      // of all streams of a call; measured with 480 MiB of third-level cache
constexpr int64_t kFirstLook = 64;      // steps of the first search for a write; each further one is twice as long
constexpr int64_t kLeastSegment = 512;  // steps: a search should be short compared with a segment

inline int64_t state_bytes(const Scan& scan) { return element_bytes(scan.state); }
// Whether a call takes at least kLargeBytes: then non-temporal stores are faster, also if the next op reads the results.
bool is_large(const Scan& scan);
// A thread's non-temporal stores come before its later stores. No test can see that this is missing.
inline void fence_stores(const Scan& scan) {
#if defined(__SSE2__)
  if (scan.non_temporal) __builtin_ia32_sfence();
#endif
}
inline bool is_serial(const Scan& scan) { return scan.batch * scan.time * scan.channels < kSerialElements; }

// Raises unless the offsets of packed sequences rise from 0 to T.
void check_offsets(const Scan& scan);
// Raises unless every slot is -1 or one of those that there are, and no two are the same.
void check_slots(const Scan& scan);

struct Segments {
  std::vector<Segment> list;
  std::vector<int64_t> first;  // [sequences + 1]: sequence n has the segments [first[n], first[n + 1])

  bool is_empty(int64_t sequence) const { return first[sequence] == first[sequence + 1]; }
  int64_t count() const { return int64_t(list.size()); }
};
// Cuts by scan.segment, and at the offsets, which must have been checked.
Segments cut(const Scan& scan);

// The first position from `from` on, in steps of `direction`, before which the state is reset; `end` if there is none.
inline int64_t find_reset(const Scan& scan, const Segment& segment, int64_t from, int64_t end, int64_t direction) {
  if (!scan.resets) return end;
  const int64_t first = segment.start + from, by = scan.reverse ? -direction : direction;
  const bool* at = scan.resets + segment.batch * scan.time + (scan.reverse ? scan.time - 1 - first : first);
  while (from != end) {
    uint64_t eight = 1;
    const bool whole = std::abs(end - from) >= 8;
    if (whole) std::memcpy(&eight, by > 0 ? at : at - 7, 8);
    if (*at) return from;
    const int64_t steps = eight == 0 ? 8 : 1;
    from += steps * direction, at += steps * by;
  }
  return end;
}

// Calls f(part) for the parts of a segment between resets, from the left.
template <class F>
void for_parts(const Scan& scan, const Segment& segment, const F& f) {
  Segment part = segment;
  for (int64_t begin = segment.begin; begin < segment.end; begin = part.end) {
    part.begin = begin;
    part.resets = find_reset(scan, segment, begin, begin + 1, 1) == begin;
    part.end = find_reset(scan, segment, begin + 1, segment.end, 1);
    f(part);
  }
}
// The same from the right.
template <class F>
void for_parts_from_right(const Scan& scan, const Segment& segment, const F& f) {
  Segment part = segment;
  for (int64_t end = segment.end; end > segment.begin; end = part.begin) {
    const int64_t reset = find_reset(scan, segment, end - 1, segment.begin - 1, -1);
    part.end = end;
    part.resets = reset >= segment.begin;
    part.begin = std::max(reset, segment.begin);
    f(part);
  }
}

// Calls f(item, d0, d1) for every item and block of channels [d0, d1), on several threads.
template <class F>
void for_blocks(const Scan& scan, int64_t items, const F& f) {
  if (items == 0 || scan.channels == 0) return;
  const int64_t bytes = state_bytes(scan), least = kLeastBlockBytes / bytes;
  const int64_t wanted = ceil_div(torch::stable::get_num_threads(), items);
  const int64_t blocks =
      std::max(ceil_div(scan.channels * bytes, kBlockBytes), std::min(wanted, ceil_div(scan.channels, least)));
  const int64_t width = ceil_div(ceil_div(scan.channels, blocks), 16) * 16;
  const int64_t per_item = ceil_div(scan.channels, width), units = items * per_item;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t d0 = unit % per_item * width;
      f(unit / per_item, d0, std::min(d0 + width, scan.channels));
    }
    fence_stores(scan);
  };
  if (units == 1 || is_serial(scan)) run(0, units);
  else torch::stable::parallel_for(0, units, 1, run);
}

// Zeros: rows of [D] in the state dtype, or of elements of `element` bytes.
class Rows {
 public:
  Rows(const Scan& scan, int64_t rows) : Rows(scan, rows, state_bytes(scan)) {}
  Rows(const Scan& scan, int64_t rows, int64_t element)
      : row_(scan.channels * element), element_(element), bytes_(rows * row_) {}
  void* at(int64_t row, int64_t d = 0) { return bytes_.data() + row * row_ + d * element_; }
  const void* at(int64_t row, int64_t d = 0) const { return bytes_.data() + row * row_ + d * element_; }

 private:
  int64_t row_, element_;
  std::vector<char> bytes_;
};

// Rows of maps.
struct Maps {
  Rows a, b;
  Maps(const Scan& scan, int64_t rows) : a(scan, rows), b(scan, rows) {}
  MapRow at(int64_t row, int64_t d = 0) { return {a.at(row, d), b.at(row, d)}; }
};

// Row n of `base` [any, D], in the state dtype.
inline char* row(void* base, const Scan& scan, int64_t n, int64_t d = 0) {
  return static_cast<char*>(base) + (n * scan.channels + d) * state_bytes(scan);
}
inline int64_t row_bytes(const Scan& scan) { return scan.channels * state_bytes(scan); }

// The state that enters each sequence after a reset: [sequences, D], or nothing if the call has no resets.
class ResetStates {
 public:
  ResetStates(const Scan& scan, const Kernels& kernels);
  const void* at(const Segment& segment, int64_t d) const { return rows_.at(segment.sequence, d); }

 private:
  Rows rows_;
};

// Gives optional inputs per channel that are absent a row of ones.
class Ones {
 public:
  Ones(Scan& scan, const Kernels& kernels);

 private:
  std::vector<char> row_;
};

}  // namespace mru::cpu
