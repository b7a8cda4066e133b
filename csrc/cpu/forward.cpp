// Forward passes: whole, cut by composing maps, and cut by looking back for the last write.
#include <cstring>

#include "cut_maps.h"
#include "driver.h"
#include "interleaved.h"

namespace mru::cpu {
namespace {

// Writes the state that enters each sequence to final_state, which the scan updates in place.
void enter(const Scan& scan, const Kernels& k, const Segments& segments) {
  for (int64_t n = 0; n < scan.sequences; ++n) {
    if (scan.slots) {  // the state is there already
      if (scan.slots[n] >= 0) k.enter(scan, row(scan.final_state, scan, scan.slots[n]));
      continue;
    }
    char* const state = row(scan.final_state, scan, n);
    if (scan.initial) std::memcpy(state, static_cast<const char*>(scan.initial) + n * row_bytes(scan), row_bytes(scan));
    else std::memset(state, 0, row_bytes(scan));
    if (!segments.is_empty(n)) k.enter(scan, state);
  }
}

// Scans a segment from `state` by `kernel`, one of the forward kernels.
template <class Kernel>
void scan_segment(const Scan& scan, Kernel kernel, const ResetStates& resets, const Segment& segment, int64_t d0,
                  int64_t d1, void* state) {
  for_parts(scan, segment, [&](const Segment& part) {
    if (part.resets) std::memcpy(state, resets.at(part, d0), (d1 - d0) * state_bytes(scan));
    kernel(scan, part, d0, d1, state);
  });
}

// Scans all segments from their rows of `states`, by one of the forward kernels.
void scan_segments(const Scan& scan, const Kernels& k, decltype(Kernels::forward) kernel, const ResetStates& resets,
                   const Segments& segments, Rows& states) {
  const std::vector<Run> runs = find_runs(scan, segments);
  if (!runs.empty())
    return for_runs(scan, runs, [&](Run run, int64_t) {
      Interleaved(scan, k, segments, run).forward(kernel, states.at(run.first));
    });
  for_blocks(scan, segments.count(), [&](int64_t i, int64_t d0, int64_t d1) {
    scan_segment(scan, kernel, resets, segments.list[i], d0, d1, states.at(i, d0));
  });
}

// The map of a segment. After a reset it is the state alone.
void summarize(const Scan& scan, const Kernels& k, const ResetStates& resets, const Segment& segment, int64_t d0,
               int64_t d1, MapRow map, void* late) {
  k.identity(d1 - d0, map);
  for_parts(scan, segment, [&](const Segment& part) {
    if (part.resets) k.head(d1 - d0, resets.at(part, d0), map);
    k.summarize(scan, part, d0, d1, map, late);
  });
}

// The step of a sequence without a slot: h is 0.
void skip(const Scan& scan, const Segment& segment, int64_t d0, int64_t d1) {
  const int64_t size = element_bytes(scan.dtype), first = segment.batch * scan.h.batch + d0;
  std::memset(static_cast<char*>(scan.h.data) + first * size, 0, (d1 - d0) * size);
}

// The map of a segment whose writes overwrite the state, seen from its end: no further back than a channel is unsettled.
void look_back(const Scan& scan, const Kernels& k, const ResetStates& resets, const Segment& segment, int64_t d0,
               int64_t d1, MapRow map) {
  Scan reads = scan;
  reads.codes = nullptr;
  Maps far(scan, 1);
  const int64_t n = d1 - d0, reset = find_reset(scan, segment, segment.end - 1, segment.begin - 1, -1);
  const int64_t begin = std::max(reset, segment.begin);
  Segment part = segment;
  part.begin = segment.end;
  k.identity(n, map);
  for (int64_t steps = kFirstLook; part.begin > begin; steps *= 2) {
    part.end = part.begin;
    part.begin = std::max(begin, part.end - steps);
    k.identity(n, far.at(0, d0));
    k.summarize(reads, part, d0, d1, far.at(0, d0), nullptr);
    if (!k.look_through(n, far.at(0, d0), map)) return;
  }
  if (reset < segment.begin) return;
  k.constant(n, resets.at(segment, d0), far.at(0, d0));
  k.look_through(n, far.at(0, d0), map);
}

// One pass over the streams. Each segment starts from the last write before it, which is usually a few steps back. Only a NaN
// further back is missed: the segments after it are scanned once more.
void forward_looking_back(Scan scan, const Kernels& k, const ResetStates& resets) {
  const int64_t pieces = 2 * most_in_run(scan) * int64_t(torch::stable::get_num_threads());
  const int64_t wanted = ceil_div(scan.batch * scan.time, pieces);
  const int64_t least = scan.segment > 0 ? scan.segment : kLeastSegment;
  scan.segment = ceil_div(std::max(wanted, least), scan.chunk) * scan.chunk;
  const Segments segments = cut(scan);
  const int64_t count = segments.count();
  const auto each = [&](const auto& f) {  // segment that has one before it in its sequence
    for (int64_t n = 0; n < scan.sequences; ++n)
      for (int64_t i = segments.first[n] + 1; i < segments.first[n + 1]; ++i) f(i);
  };

  Maps maps(scan, count);
  for_blocks(scan, count, [&](int64_t i, int64_t d0, int64_t d1) {
    if (segments.list[i].end < segments.list[i].length)
      look_back(scan, k, resets, segments.list[i], d0, d1, maps.at(i, d0));
  });
  Rows entry(scan, count);
  for (int64_t n = 0; n < scan.sequences; ++n)
    if (!segments.is_empty(n))
      std::memcpy(entry.at(segments.first[n]), row(scan.final_state, scan, n), row_bytes(scan));
  each([&](int64_t i) {
    std::memcpy(entry.at(i), entry.at(i - 1), row_bytes(scan));
    k.apply(scan.channels, /*resets=*/true, maps.at(i - 1), entry.at(i));
  });
  Rows exit = entry;
  const auto kernel = scan.codes && scan.save ? k.forward_to_codes : k.forward;
  scan_segments(scan, k, kernel, resets, segments, exit);

  std::vector<int64_t> again;
  each([&](int64_t i) {
    const Segment& segment = segments.list[i];
    if (!k.absorb(scan.channels, exit.at(i - 1), entry.at(i))) return;
    if (find_reset(scan, segment, segment.begin, segment.end, 1) == segment.end)
      k.absorb(scan.channels, exit.at(i - 1), exit.at(i));
    again.push_back(i);
  });
  for_blocks(scan, again.size(), [&](int64_t a, int64_t d0, int64_t d1) {
    scan_segment(scan, k.forward, resets, segments.list[again[a]], d0, d1, entry.at(again[a], d0));
  });
  for (int64_t n = 0; n < scan.sequences; ++n)
    if (!segments.is_empty(n))
      std::memcpy(row(scan.final_state, scan, n), exit.at(segments.first[n + 1] - 1), row_bytes(scan));
}

// Two passes: segments as maps, which are composed, then the segments, each from its entry state. Packs the codes. Returns
// false if the call must be scanned whole.
bool forward_composing(const Scan& scan, const Kernels& k, const ResetStates& resets, const Segments& segments) {
  CutMaps cut_maps(scan, k, segments, 1);
  const std::vector<Run> runs = find_runs(scan, segments);
  for_runs(scan, runs, [&](Run run, int64_t) {
    Interleaved(scan, k, segments, run).summarize(cut_maps.maps.at(run.first), cut_maps.late.at(run.first));
  });
  for_blocks(scan, runs.empty() ? segments.count() : 0, [&](int64_t i, int64_t d0, int64_t d1) {
    summarize(scan, k, resets, segments.list[i], d0, d1, cut_maps.maps.at(i, d0), cut_maps.late.at(i, d0));
  });
  cut_maps.compose(scan.final_state);
  const auto kernel = scan.codes ? k.forward_from_codes : k.forward;
  scan_segments(scan, k, kernel, resets, segments, cut_maps.exit);
  return cut_maps.finish(scan.final_state);
}

}  // namespace

void forward(Scan scan, const Kernels& k) {
  check_offsets(scan);
  check_slots(scan);
  if (scan.sequences == 0 || scan.channels == 0) return;
  scan.non_temporal = is_large(scan);
  if (scan.offsets) {  // there are rows between the sequences
    const int64_t rows = scan.batch * scan.channels;
    if (scan.checkpoints) std::memset(scan.checkpoints, 0, scan.checkpoint_rows * rows * state_bytes(scan));
    if (scan.codes) std::memset(scan.codes, 0, scan.code_rows * rows * sizeof(int32_t));
  }
  const Ones ones(scan, k);
  const ResetStates resets(scan, k);
  Segments segments = cut(scan);
  enter(scan, k, segments);
  const bool few = scan.sequences < torch::stable::get_num_threads() && scan.time >= 2 * kLeastSegment;
  if (k.overwrites(scan) && (scan.segment > 0 || (few && !is_serial(scan))))
    return forward_looking_back(scan, k, resets);
  if (scan.segment > 0) {
    if (forward_composing(scan, k, resets, segments)) return;
    scan.segment = 0;
    segments = cut(scan);
    enter(scan, k, segments);
  }
  for_blocks(scan, segments.count(), [&](int64_t i, int64_t d0, int64_t d1) {
    const Segment& segment = segments.list[i];  // a whole sequence
    const int64_t n = scan.slots ? scan.slots[segment.sequence] : segment.sequence;
    if (n >= 0) scan_segment(scan, k.forward, resets, segment, d0, d1, row(scan.final_state, scan, n, d0));
    else skip(scan, segment, d0, d1);
  });
}

void map(Scan scan, const Kernels& k, MapRow result) {
  check_offsets(scan);
  if (scan.sequences == 0 || scan.channels == 0) return;
  const Ones ones(scan, k);
  const ResetStates resets(scan, k);
  const Segments segments = cut(scan);
  Maps maps(scan, segments.count());
  for_blocks(scan, segments.count(), [&](int64_t i, int64_t d0, int64_t d1) {
    summarize(scan, k, resets, segments.list[i], d0, d1, maps.at(i, d0), nullptr);
  });
  for (int64_t n = 0; n < scan.sequences; ++n) {
    const MapRow total{row(result.a, scan, n), row(result.b, scan, n)};
    k.identity(scan.channels, total);
    bool is_reset = false;
    for (int64_t i = segments.first[n]; i < segments.first[n + 1]; ++i) {
      const Segment& segment = segments.list[i];
      k.then(scan.channels, total, maps.at(i));
      is_reset = is_reset || find_reset(scan, segment, segment.begin, segment.end, 1) < segment.end;
    }
    if (is_reset) std::memset(total.a, 0, row_bytes(scan));
    if (!segments.is_empty(n)) k.enter(scan, total.b);
  }
}

}  // namespace mru::cpu
