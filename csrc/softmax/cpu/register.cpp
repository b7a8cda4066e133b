// Runs a HeadScan on the CPU: cuts it into segments of time and blocks of heads, and spreads these over threads. The cut of
// time and the order of every sum are functions of sizes only, and heads never interact, so results do not depend on the
// number of threads.
#include <cstring>
#include <memory>

#include "../../cpu/isa.h"
#include "../../cpu/plan.h"
#include "../ops.h"
#include "kernels.h"

namespace mru::softmax {
namespace {

using cpu::Segments;

constexpr int64_t kBlockBytes = 4096;     // of a row of values: wider blocks use memory bandwidth better
constexpr int64_t kLeastBlockBytes = 64;  // of a block that is narrower for the sake of the threads
constexpr int64_t kMostGroups = 256;      // of segments that share a row of sums

const HeadKernels& choose(const HeadScan& scan) {
  switch (cpu::isa()) {
#ifdef MRU_CHOOSES_ISA
    case Isa::kAvx512: return head_kernels<Isa::kAvx512>(scan);
    case Isa::kAvx2: return head_kernels<Isa::kAvx2>(scan);
#endif
    default: return head_kernels<Isa::kBaseline>(scan);
  }
}

// As for the cells (cpu/plan.h); scores and decays have H columns.
bool is_large(const HeadScan& scan) {
  int64_t columns = 0;
  const auto add = [&](const Stream& stream, int64_t of_step) { columns += stream.data ? of_step : 0; };
  add(scan.h, scan.channels), add(scan.grad_h, scan.channels);
  for (const auto of : {kScore, kValue, kDecay}) {
    const int64_t of_step = of == kValue ? scan.channels : scan.heads;
    add(scan.in[of].stream, of_step), add(scan.grad_in[of], of_step);
  }
  return columns * scan.batch * scan.time * element_bytes(scan.dtype) >= cpu::kLargeBytes;
}

int64_t state_columns(const HeadScan& scan) { return scan.channels + 2 * scan.heads; }
int64_t state_row_bytes(const HeadScan& scan) { return state_columns(scan) * scan.state_bytes(); }

// Rows of `columns` elements in the state dtype, zeros at first.
class Rows {
 public:
  Rows(const HeadScan& scan, int64_t rows, int64_t columns) : row_(columns * scan.state_bytes()), bytes_(rows * row_) {}
  char* at(int64_t row) { return bytes_.data() + row * row_; }

 private:
  int64_t row_;
  std::vector<char> bytes_;
};

// The fewest heads of a block.
constexpr int64_t least_heads(int64_t group, int64_t bytes) {
  return std::max<int64_t>(kLeastBlockBytes / (bytes * std::max<int64_t>(group, 1)), 1);
}

// Calls f(item, h0, h1, scratch) for every item and block of heads [h0, h1), on several threads.
template <class F>
void for_heads(const HeadScan& scan, int64_t items, const F& f) {
  if (items == 0) return;
  const int64_t bytes = scan.state_bytes(), group = std::max<int64_t>(scan.channels / scan.heads, 1);
  const int64_t most = std::max<int64_t>(kBlockBytes / (bytes * group), 1);
  const int64_t least = least_heads(group, bytes);
  const int64_t wanted = ceil_div(torch::stable::get_num_threads(), items);
  int64_t width = std::clamp(ceil_div(scan.heads, wanted), least, most);
  if (width > kMostLanes) width = ceil_div(width, kMostLanes) * kMostLanes;
  const int64_t per_item = ceil_div(scan.heads, width), units = items * per_item;
  const auto run = [&](int64_t begin, int64_t end) {
    thread_local std::vector<char> scratch;
    const int64_t wanted_bytes = scratch_elements(scan, width) * bytes;
    if (int64_t(scratch.size()) < wanted_bytes) scratch.resize(wanted_bytes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t h0 = unit % per_item * width;
      f(unit / per_item, h0, std::min(h0 + width, scan.heads), scratch.data());
    }
    cpu::fence_stores(scan);
  };
  if (units == 1 || cpu::is_serial(scan)) run(0, units);
  else torch::stable::parallel_for(0, units, 1, run);
}

// Writes an empty state.
template <class S>
void write_empty(const HeadScan& scan, void* row) {
  S* const state = static_cast<S*>(row);
  std::fill_n(state, state_columns(scan), S(0));
  std::fill_n(state + scan.channels, scan.heads, -std::numeric_limits<S>::infinity());
}
void write_initial(const HeadScan& scan, int64_t sequence, void* row) {
  const int64_t bytes = state_row_bytes(scan);
  if (scan.initial) std::memcpy(row, static_cast<const char*>(scan.initial) + sequence * bytes, bytes);
  else if (scan.dtype == Dtype::kFloat64) write_empty<double>(scan, row);
  else write_empty<float>(scan, row);
}
char* row_of(void* rows, const HeadScan& scan, int64_t n) {
  return static_cast<char*>(rows) + n * state_row_bytes(scan);
}

// The maps of the segments, and the states that enter them. `final` [N, D + 2 H]: initial states -> final states.
struct SegmentMaps {
  Rows maps, entry;

  SegmentMaps(const HeadScan& scan, const HeadKernels& k, const Segments& segments)
      : maps(scan, segments.count(), state_columns(scan) + scan.heads),
        entry(scan, segments.count(), state_columns(scan)) {
    for_heads(scan, segments.count(), [&](int64_t i, int64_t h0, int64_t h1, void* scratch) {
      k.summarize(scan, segments.list[i], h0, h1, maps.at(i), scratch);
    });
    for (int64_t n = 0; n < scan.sequences; ++n)
      for (int64_t i = segments.first[n]; i < segments.first[n + 1]; ++i) {
        if (i == segments.first[n]) {
          write_initial(scan, n, entry.at(i));
        } else {
          std::memcpy(entry.at(i), entry.at(i - 1), state_row_bytes(scan));
          k.carry(scan, maps.at(i - 1), entry.at(i));
        }
      }
  }
};

void run_forward(HeadScan scan) {
  cpu::check_offsets(scan);
  if (scan.sequences == 0 || scan.heads == 0) return;
  scan.non_temporal = is_large(scan);
  if (scan.offsets && scan.checkpoints)  // there are rows between the sequences
    std::memset(scan.checkpoints, 0, scan.checkpoint_rows * scan.batch * state_row_bytes(scan));
  const HeadKernels& k = choose(scan);
  const Segments segments = cpu::cut(scan);
  for (int64_t n = 0; n < scan.sequences; ++n) write_initial(scan, n, row_of(scan.final_state, scan, n));
  if (scan.segment == 0) {
    for_heads(scan, segments.count(), [&](int64_t i, int64_t h0, int64_t h1, void* scratch) {
      void* const state = row_of(scan.final_state, scan, segments.list[i].sequence);
      k.forward(scan, segments.list[i], h0, h1, state, scratch);
    });
    return;
  }
  SegmentMaps cut(scan, k, segments);
  for_heads(scan, segments.count(), [&](int64_t i, int64_t h0, int64_t h1, void* scratch) {
    k.forward(scan, segments.list[i], h0, h1, cut.entry.at(i), scratch);
  });
  for (int64_t n = 0; n < scan.sequences; ++n)
    if (!segments.is_empty(n))
      std::memcpy(row_of(scan.final_state, scan, n), cut.entry.at(segments.first[n + 1] - 1), state_row_bytes(scan));
}

// The backward pass over a call's segments. The sums over time of the inputs [H] are rows of groups of segments.
class BackwardPass {
 public:
  BackwardPass(const HeadScan& scan, const HeadKernels& k, const Segments& segments)
      : scan_(scan),
        k_(k),
        segments_(segments),
        per_group_(std::max<int64_t>(1, ceil_div(segments.count(), kMostGroups))),
        groups_(ceil_div(segments.count(), per_group_)),
        sums_(scan, groups_, 4 * scan.heads) {}

  // adjoint(i): the row of segment i, that from its right, which becomes that to its left; null to skip the segment.
  template <class Row>
  void run(const Row& adjoint) {
    for_heads(scan_, groups_, [&](int64_t group, int64_t h0, int64_t h1, void* scratch) {
      for (int64_t i = std::min((group + 1) * per_group_, segments_.count()); i-- > group * per_group_;)
        if (void* const row = adjoint(i)) k_.backward(scan_, segments_.list[i], h0, h1, row, sums_.at(group), scratch);
    });
  }
  void finish() {
    if (scan_.grad_channel[kDecay]) k_.total(scan_, sums_.at(0), groups_, 0, scan_.grad_channel[kDecay]);
    if (scan_.grad_channel[kBonus]) k_.total(scan_, sums_.at(0), groups_, 2, scan_.grad_channel[kBonus]);
  }

 private:
  const HeadScan& scan_;
  const HeadKernels& k_;
  const Segments& segments_;
  const int64_t per_group_, groups_;
  Rows sums_;
};

// Finds the adjoint from the right of every segment. `exits` has grad_final in the last segment of each sequence, and zeros.
void carry_adjoints(const HeadScan& scan, const HeadKernels& k, const Segments& segments, Rows& exits) {
  const int64_t count = segments.count(), bytes = state_row_bytes(scan);
  Rows offsets = exits, maps(scan, count, state_columns(scan) + scan.heads);
  const auto is_first = [&](int64_t i) { return i == segments.first[segments.list[i].sequence]; };
  for_heads(scan, count, [&](int64_t i, int64_t h0, int64_t h1, void*) {
    if (!is_first(i)) k.sum_decays(scan, segments.list[i], h0, h1, maps.at(i));
  });
  HeadScan without_results = scan;
  for (Stream& grad : without_results.grad_in) grad = {};
  BackwardPass(without_results, k, segments).run([&](int64_t i) -> void* {
    return is_first(i) ? nullptr : offsets.at(i);
  });
  const auto border = [&](int64_t i) {
    const Segment& segment = segments.list[i];
    const int64_t at =
        segment.batch * scan.checkpoint_rows + (segment.start / scan.chunk + segment.begin / scan.chunk - 1);
    return static_cast<const char*>(scan.checkpoints) + at * bytes;
  };
  for (int64_t n = 0; n < scan.sequences; ++n) {
    const int64_t first = segments.first[n], last = segments.first[n + 1] - 1;
    for (int64_t i = last; i > first; --i) {
      if (i == last) {  // its offset started from grad_final
        std::memcpy(exits.at(i - 1), offsets.at(i), bytes);
        continue;
      }
      std::memcpy(exits.at(i - 1), exits.at(i), bytes);
      k.carry_adjoint(scan, maps.at(i), border(i), border(i + 1), offsets.at(i), exits.at(i - 1));
    }
  }
}

void run_backward(HeadScan scan) {
  cpu::check_offsets(scan);
  if (scan.heads == 0 || (scan.sequences == 0 && !scan.grad_channel[kDecay] && !scan.grad_channel[kBonus])) return;
  scan.non_temporal = is_large(scan);
  const int64_t bytes = state_row_bytes(scan);
  if (scan.sequences > 0) std::memcpy(scan.grad_initial, scan.grad_final, scan.sequences * bytes);
  const HeadKernels& k = choose(scan);
  const Segments segments = cpu::cut(scan);
  Rows initial(scan, scan.initial ? 0 : scan.sequences, state_columns(scan));
  if (!scan.initial) {
    for (int64_t n = 0; n < scan.sequences; ++n) write_initial(scan, n, initial.at(n));
    scan.initial = initial.at(0);
  }
  BackwardPass pass(scan, k, segments);
  if (scan.segment == 0) {
    pass.run([&](int64_t i) { return row_of(scan.grad_initial, scan, segments.list[i].sequence); });
  } else {
    Rows exits(scan, segments.count(), state_columns(scan));
    for (int64_t n = 0; n < scan.sequences; ++n)
      if (!segments.is_empty(n))
        std::memcpy(exits.at(segments.first[n + 1] - 1), row_of(scan.grad_initial, scan, n), bytes);
    carry_adjoints(scan, k, segments, exits);
    pass.run([&](int64_t i) { return exits.at(i); });
    for (int64_t n = 0; n < scan.sequences; ++n)
      if (!segments.is_empty(n)) std::memcpy(row_of(scan.grad_initial, scan, n), exits.at(segments.first[n]), bytes);
  }
  pass.finish();
  // The gradient of z is that of Z.
  const int64_t heads = scan.heads * scan.state_bytes();
  for (int64_t n = 0; n < scan.sequences; ++n) {
    char* const of_Z = row_of(scan.grad_initial, scan, n) + scan.channels * scan.state_bytes();
    std::memcpy(of_Z + heads, of_Z, heads);
  }
}

struct Cpu {
  static constexpr int64_t kMostChunk = 4096;

  // In steps; 0 to scan each sequence as a whole.
  static int64_t segment(const HeadSizes& n) {
    constexpr int64_t kEnough = 4;     // units of work (sequences x blocks); time is cut only below this number
    constexpr int64_t kSegments = 64;  // most segments of a call
    constexpr int64_t kLeast = 512;    // least steps of a segment
    if (n.heads == 0) return 0;
    const int64_t least = least_heads(n.channels / n.heads, std::max<int64_t>(n.itemsize, sizeof(float)));
    const int64_t blocks = ceil_div(n.heads, least), units = n.sequences * blocks;
    if (units >= kEnough || units == 0 || n.steps < 2 * kLeast * n.sequences) return 0;
    return ceil_div(std::max(n.steps * blocks / kSegments, kLeast), kSegmentUnit) * kSegmentUnit;
  }
  static void forward(const HeadScan& scan, const Tensor&) { run_forward(scan); }
  static void backward(const HeadScan& scan, const Tensor&) { run_backward(scan); }
};

}  // namespace
}  // namespace mru::softmax

STABLE_TORCH_LIBRARY_IMPL(mru, CPU, m) { mru::softmax::implement<mru::softmax::Cpu>(m, "cpu"); }
