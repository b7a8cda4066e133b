// The backward pass, whole or cut.
#include <cstring>
#include <memory>

#include "cut_maps.h"
#include "driver.h"
#include "interleaved.h"

namespace mru::cpu {
namespace {

constexpr int64_t kMostKept = 1 << 19;  // bytes of scratch that a thread keeps between calls
constexpr int64_t kMostGroups = 256;    // of segments that share a row of sums
constexpr int64_t kFewSequences = 4;    // fewer sequences of wide rows are cut where writes overwrite the state
constexpr int64_t kFewSegments = 8;     // of all their steps together

// The adjoint map of a segment whose writes overwrite the state, seen from its begin: no further than a channel is unsettled.
void look_ahead(const Scan& scan, const Kernels& k, const Segment& segment, int64_t d0, int64_t d1, MapRow map) {
  Maps far(scan, 1);
  const Rows zeros(scan, 1);
  const int64_t n = d1 - d0, end = find_reset(scan, segment, segment.begin, segment.end, 1);
  Segment part = segment;
  part.end = segment.begin;
  k.identity(n, map);
  for (int64_t steps = kFirstLook; part.end < end; steps *= 2) {
    part.begin = part.end;
    part.end = std::min(end, part.begin + steps);
    k.identity(n, far.at(0, d0));
    k.summarize_adjoint(scan, part, d0, d1, far.at(0, d0), nullptr);
    if (!k.look_through(n, far.at(0, d0), map)) return;
  }
  if (end == segment.end) return;
  k.constant(n, zeros.at(0, d0), far.at(0, d0));  // m does not pass a reset
  k.look_through(n, far.at(0, d0), map);
}

// The adjoint map of a segment, up to the first reset.
void look_through_all(const Scan& scan, const Kernels& k, const Segment& segment, int64_t d0, int64_t d1, MapRow map,
                      void* late) {
  const Rows zeros(scan, 1);
  Segment part = segment;
  part.end = find_reset(scan, segment, segment.begin, segment.end, 1);
  if (part.end == segment.end) k.identity(d1 - d0, map);
  else k.head(d1 - d0, zeros.at(0, d0), map);
  k.summarize_adjoint(scan, part, d0, d1, map, late);
}

// Runs `backward` on every segment. The sums over time of the inputs per channel are rows of groups of segments.
class BackwardPass {
 public:
  BackwardPass(const Scan& scan, const Kernels& k, const Segments& segments)
      : scan_(scan),
        k_(k),
        segments_(segments),
        runs_(find_runs(scan, segments)),
        per_group_(std::max<int64_t>(1, ceil_div(segments.count(), kMostGroups))),
        groups_(runs_.empty() ? ceil_div(segments.count(), per_group_) : int64_t(runs_.size())),
        inputs_(__builtin_popcount(k.channels)),
        sums_(scan, groups_ * 2 * inputs_),
        reset_sums_(scan, scan.grad_reset_state ? 2 * segments.count() : 0) {}

  // m(i, d): the row that is m from the right of segment i, and becomes m to its left. late(i, d): see Kernels::backward.
  template <class M, class Late>
  void run(const M& m, const Late& late) {
    if (!runs_.empty())
      return for_runs(scan_, runs_, [&](Run run, int64_t number) {
        Interleaved(scan_, k_, segments_, run)
            .backward(m(run.first, 0), late(run.first, 0), sums_.at(number * 2 * inputs_));
      });
    for_blocks(scan_, groups_, [&](int64_t group, int64_t d0, int64_t d1) {
      thread_local std::vector<char> kept;
      const int64_t bytes = scratch_rows(scan_.chunk) * (d1 - d0) * state_bytes(scan_);
      const std::unique_ptr<char[]> own(bytes > kMostKept ? new char[bytes] : nullptr);
      if (!own && int64_t(kept.size()) < bytes) kept.resize(bytes);
      char* const scratch = own ? own.get() : kept.data();
      for (int64_t i = group * per_group_; i < std::min((group + 1) * per_group_, segments_.count()); ++i)
        for_parts_from_right(scan_, segments_.list[i], [&](const Segment& part) {
          k_.backward(scan_, part, d0, d1, m(i, d0), sums_.at(group * 2 * inputs_, d0), scan_.channels, scratch,
                      late(i, d0));
          if (part.resets) take(i, d0, d1, m(i, d0));
        });
    });
  }

  // Adds the groups up, in order, and the segments of each sequence.
  void finish() {
    int64_t which = 0;
    for (int i = 0; i < k_.inputs; ++i) {
      if ((k_.channels >> i & 1) == 0) continue;
      void* const total = scan_.grad_channel[i];
      const void* const sums = sums_.at(which++);
      if (total)
        k_.reduce(scan_.channels, groups_, 2 * inputs_ * scan_.channels, inputs_ * scan_.channels, sums, total);
    }
    for (int64_t n = 0; scan_.grad_reset_state && n < scan_.sequences; ++n) {
      const int64_t first = segments_.first[n], count = segments_.first[n + 1] - first;
      k_.reduce(scan_.channels, count, 2 * scan_.channels, scan_.channels, reset_sums_.at(2 * first),
                row(scan_.grad_reset_state, scan_, n));
    }
  }

 private:
  // m ends at a reset: it is a gradient of the reset state.
  void take(int64_t segment, int64_t d0, int64_t d1, void* m) {
    void* const sum = scan_.grad_reset_state ? reset_sums_.at(2 * segment, d0) : nullptr;
    void* const lost = sum ? reset_sums_.at(2 * segment + 1, d0) : nullptr;
    k_.take(d1 - d0, m, sum, lost);
  }

  const Scan& scan_;
  const Kernels& k_;
  const Segments& segments_;
  const std::vector<Run> runs_;
  const int64_t per_group_, groups_, inputs_;
  Rows sums_, reset_sums_;  // rows of sums over time, and of what they have lost
};

// A scan whose backward pass gives no gradients of inputs per channel.
Scan without_sums(Scan scan) {
  for (void*& grad : scan.grad_channel) grad = nullptr;
  return scan;
}

// Finds the adjoint map of every segment. If it depends on the states, a backward pass from m = 0 gives its offset; the
// results of that pass are overwritten later.
void summarize_adjoint(const Scan& scan, const Kernels& k, const Segments& segments, CutMaps& cut_maps) {
  const bool looks = k.overwrites(scan) && !k.adjoint_sees_state;
  const std::vector<Run> runs = looks ? std::vector<Run>() : find_runs(scan, segments);
  for_runs(scan, runs, [&](Run run, int64_t) {
    Interleaved(scan, k, segments, run).summarize_adjoint(cut_maps.maps.at(run.first), cut_maps.late.at(run.first));
  });
  for_blocks(scan, runs.empty() ? segments.count() : 0, [&](int64_t i, int64_t d0, int64_t d1) {
    const MapRow map = cut_maps.maps.at(i, d0);
    if (looks) look_ahead(scan, k, segments.list[i], d0, d1, map);
    else look_through_all(scan, k, segments.list[i], d0, d1, map, cut_maps.late.at(i, d0));
  });
  if (!k.adjoint_sees_state) return;
  const Scan offsets_only = without_sums(scan);
  BackwardPass(offsets_only, k, segments)
      .run([&](int64_t i, int64_t d) { return cut_maps.maps.b.at(i, d); },
           [&](int64_t i, int64_t d) { return cut_maps.late.at(i, d); });
}

// The segment of a few sequences of wide rows whose writes overwrite the state; 0 for others. Threads that share a sequence
// have blocks of its rows, which are not contiguous, or segments, which cost a short look ahead.
int64_t segment_of_few(const Scan& scan, const Kernels& k) {
  const int64_t steps = scan.batch * scan.time;
  const bool is_wide = row_bytes(scan) >= kBlockBytes, is_long = steps >= 2 * kLeastSegment * scan.sequences;
  if (!k.overwrites(scan) || k.adjoint_sees_state || scan.sequences >= kFewSequences || !is_wide || !is_long) return 0;
  const int64_t units = ceil_div(std::max(ceil_div(steps, kFewSegments), kLeastSegment), kSegmentUnit);
  return ceil_div(units * kSegmentUnit, scan.chunk) * scan.chunk;
}

// Returns false, without writing the sums over time, if the call must be scanned whole.
bool differentiate(const Scan& scan, const Kernels& k) {
  const Segments segments = cut(scan);
  const int64_t states_bytes = scan.sequences * row_bytes(scan);
  if (states_bytes > 0) std::memcpy(scan.grad_initial, scan.grad_final, states_bytes);
  const auto no_late = [](int64_t, int64_t) -> void* { return nullptr; };
  BackwardPass pass(scan, k, segments);
  if (scan.segment > 0) {
    CutMaps cut_maps(scan, k, segments, -1);
    summarize_adjoint(scan, k, segments, cut_maps);
    cut_maps.compose(scan.grad_initial);
    pass.run([&](int64_t i, int64_t d) { return cut_maps.exit.at(i, d); }, no_late);
    if (!cut_maps.finish(scan.grad_initial)) return false;
  } else {
    const auto m = [&](int64_t i, int64_t d) { return row(scan.grad_initial, scan, segments.list[i].sequence, d); };
    pass.run(m, no_late);
  }
  pass.finish();
  return true;
}

}  // namespace

void backward(Scan scan, const Kernels& k) {
  check_offsets(scan);
  if (scan.channels == 0) return;
  scan.non_temporal = is_large(scan);
  for (int i = 0; i < k.inputs; ++i) {
    void*& grad = scan.grad_channel[i];
    if (grad == nullptr || scan.wanted >> i & 1) continue;
    std::memset(grad, 0, row_bytes(scan));
    grad = nullptr;
  }
  const Ones ones(scan, k);
  if (scan.segment == 0) scan.segment = segment_of_few(scan, k);
  if (differentiate(scan, k)) return;
  scan.segment = 0;
  differentiate(scan, k);
}

}  // namespace mru::cpu
