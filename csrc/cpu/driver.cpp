// How a scan is spread over threads. Two grids, kept apart on purpose:
//
//   time       A sequence is one piece, or, where scan.segment > 0, cut into segments that are summarised in parallel,
//              given their entry state by a short sequential pass, and then scanned in parallel. The cut and the
//              order of every sum are functions of sizes only, so results do not depend on the number of threads.
//              Where a write forgets, a forward pass only copies values, so its cut may suit the threads.
//   channels   Channels never meet, so a row may be cut into blocks to suit the threads without changing a bit.
#include "driver.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include "../expect.h"

#if defined(__x86_64__) && !defined(MRU_ONE_ISA)
#define MRU_CHOOSES_ISA
#endif

namespace mru::cpu {
namespace {

// Bytes of one row's block: the wider, the better does memory follow.
constexpr int64_t kBlockBytes = 4096, kLeastBlockBytes = 256;
constexpr int64_t kLeastSegment = 512;        // steps: to look back for a write should be little beside it
constexpr int64_t kSerialElements = 1 << 15;  // below this, threads cost more than they bring
constexpr int64_t kMostKept = 1 << 19;        // bytes of scratch that a thread keeps between calls
constexpr int64_t kGroups = 256;              // at most so many rows of partial sums

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <Isa kIsa>
const Kernels& of_cell(const Scan& scan) {
  switch (scan.cell) {
    case CellKind::kBmru: return mru::kernels<kIsa, CellKind::kBmru>(scan);
    case CellKind::kSchmitt: return mru::kernels<kIsa, CellKind::kSchmitt>(scan);
    case CellKind::kLinear: return mru::kernels<kIsa, CellKind::kLinear>(scan);
  }
  __builtin_unreachable();
}

const Kernels& kernels(const Scan& scan) {
  switch (isa()) {
#ifdef MRU_CHOOSES_ISA
    case Isa::kAvx512: return of_cell<Isa::kAvx512>(scan);
    case Isa::kAvx2: return of_cell<Isa::kAvx2>(scan);
#endif
    default: return of_cell<Isa::kBaseline>(scan);
  }
}

int64_t state_bytes(const Scan& scan) { return mru::state_bytes(scan.dtype); }

struct Pieces {
  std::vector<Piece> list;
  std::vector<int64_t> first;  // [sequences + 1]: the pieces of a sequence
};

void check_offsets(const Scan& scan) {
  if (!scan.offsets) return;
  constexpr const char* expected = "cu_seqlens: expected offsets that rise from 0 to the total length ";
  const int64_t first = scan.offsets[0], last = scan.offsets[scan.sequences];
  MRU_EXPECT(first == 0 && last == scan.time, expected, scan.time, ", got ", first, " to ", last);
  for (int64_t n = 0; n < scan.sequences; ++n) {
    const int64_t begin = scan.offsets[n], end = scan.offsets[n + 1];
    MRU_EXPECT(0 <= begin && begin <= end && end <= scan.time, expected, scan.time, ", got ", begin, " and ", end,
               " for sequence ", n);
  }
}

// Requires check_offsets.
Pieces cut(const Scan& scan) {
  Pieces pieces;
  pieces.first.reserve(scan.sequences + 1);
  for (int64_t n = 0; n < scan.sequences; ++n) {
    pieces.first.push_back(pieces.list.size());
    Piece piece{n, n, 0, scan.time, 0, 0, 0};
    if (scan.offsets) {
      const int64_t begin = scan.offsets[n], end = scan.offsets[n + 1];
      piece.batch = 0;
      piece.start = scan.reverse ? scan.time - end : begin;
      piece.length = end - begin;
      // Unique: a sequence takes at most one word more than its share of whole ones.
      piece.word = piece.start / kEventsPerWord + (scan.reverse ? scan.sequences - 1 - n : n);
    }
    const int64_t most = scan.segment > 0 ? scan.segment : piece.length;
    for (piece.begin = 0; piece.begin < piece.length; piece.begin = piece.end) {
      piece.end = std::min(piece.begin + most, piece.length);
      pieces.list.push_back(piece);
    }
  }
  pieces.first.push_back(pieces.list.size());
  return pieces;
}

bool is_serial(const Scan& scan) { return scan.batch * scan.time * scan.channels < kSerialElements; }

template <class F>
void parallel(const Scan& scan, int64_t units, const F& f) {
  if (units <= 1 || is_serial(scan)) f(0, units);
  else torch::stable::parallel_for(0, units, 1, f);
}

// Calls f(item, d0, d1) for every item and block of channels.
template <class F>
void for_blocks(const Scan& scan, int64_t items, const F& f) {
  if (items == 0 || scan.channels == 0) return;
  const int64_t bytes = state_bytes(scan), least = kLeastBlockBytes / bytes;
  const int64_t wanted = ceil_div(torch::stable::get_num_threads(), items);
  const int64_t blocks =
      std::max(ceil_div(scan.channels * bytes, kBlockBytes), std::min(wanted, ceil_div(scan.channels, least)));
  const int64_t width = ceil_div(ceil_div(scan.channels, blocks), 16) * 16;
  const int64_t per_item = ceil_div(scan.channels, width);
  parallel(scan, items * per_item, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t d0 = unit % per_item * width;
      f(unit / per_item, d0, std::min(d0 + width, scan.channels));
    }
  });
}

// Alpha is always given to the kernels, beside complex streams too, where it is real.
struct Ones {
  std::vector<double> f64;
  std::vector<float> f32;
  explicit Ones(Scan& scan) {
    if (scan.alpha) return;
    if (scan.dtype == Dtype::kFloat64 || scan.dtype == Dtype::kComplex128)
      f64.assign(scan.channels, 1), scan.alpha = f64.data();
    else f32.assign(scan.channels, 1), scan.alpha = f32.data();
  }
};

// Rows of [D]; elements have the state dtype, or `element` bytes.
class Rows {
 public:
  Rows(const Scan& scan, int64_t rows) : Rows(scan, rows, state_bytes(scan)) {}
  Rows(const Scan& scan, int64_t rows, int64_t element)
      : row_(scan.channels * element), element_(element), bytes_(rows * row_) {}
  void* at(int64_t row, int64_t d = 0) { return bytes_.data() + row * row_ + d * element_; }

 private:
  int64_t row_, element_;
  std::vector<char> bytes_;
};

char* row(void* base, const Scan& scan, int64_t n, int64_t d = 0) {
  return static_cast<char*>(base) + (n * scan.channels + d) * state_bytes(scan);
}

}  // namespace

// The widest set that the processor has, but none wider than ATEN_CPU_CAPABILITY allows, as for torch's own kernels.
Isa isa() {
#ifdef MRU_CHOOSES_ISA
  static const Isa widest = [] {
    const char* const variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view most = variable ? variable : "";
    if (most == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) return Isa::kBaseline;
    if (most == "avx2" || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return Isa::kAvx2;
    return Isa::kAvx512;
  }();
  return widest;
#else
  return Isa::kBaseline;
#endif
}

const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

namespace {

constexpr int64_t kFirstLook = 64;  // steps; then twice as many, and so on

bool writes_forget(const Scan& scan, const Kernels& k) { return scan.epsilon == 0 && k.behind; }

// The map of a piece whose writes forget: seen from its end, no further back than its channels hold.
void look_back(const Scan& scan, const Kernels& k, const Piece& piece, int64_t d0, int64_t d1, void* factor,
               void* offset) {
  Scan reads = scan;
  reads.events = nullptr;
  Rows part_factor(scan, 1), part_offset(scan, 1);
  Piece part = piece;
  part.begin = piece.end;
  k.summarize(reads, part, d0, d1, factor, offset, nullptr);  // of no steps: the identity
  for (int64_t steps = kFirstLook; part.begin > piece.begin; steps *= 2) {
    part.end = part.begin;
    part.begin = std::max(piece.begin, part.end - steps);
    k.summarize(reads, part, d0, d1, part_factor.at(0, d0), part_offset.at(0, d0), nullptr);
    if (!k.behind(d1 - d0, part_factor.at(0, d0), part_offset.at(0, d0), factor, offset)) break;
  }
}

// The same of the adjoint: seen from its begin, no further than its channels hold.
void look_ahead(const Scan& scan, const Kernels& k, const Piece& piece, int64_t d0, int64_t d1, void* factor,
                void* offset) {
  Rows part_factor(scan, 1), part_offset(scan, 1);
  Piece part = piece;
  part.end = piece.begin;
  k.summarize_adjoint(scan, part, d0, d1, factor, offset, nullptr);  // of no steps: the identity
  for (int64_t steps = kFirstLook; part.end < piece.end; steps *= 2) {
    part.begin = part.end;
    part.end = std::min(piece.end, part.begin + steps);
    k.summarize_adjoint(scan, part, d0, d1, part_factor.at(0, d0), part_offset.at(0, d0), nullptr);
    if (!k.ahead(d1 - d0, part_factor.at(0, d0), part_offset.at(0, d0), factor, offset)) break;
  }
}

// One pass over the streams, in pieces that are given the state that the last write before them left, which is seldom
// far. What is not seen that way is a NaN that came before: the pieces after it are scanned once more.
void forward_looking_back(Scan scan, const Kernels& k) {
  const int64_t wanted = ceil_div(scan.batch * scan.time, 2 * int64_t(torch::stable::get_num_threads()));
  const int64_t least = scan.segment > 0 ? scan.segment : kLeastSegment;
  scan.segment = ceil_div(std::max(wanted, least), scan.chunk) * scan.chunk;
  const Pieces pieces = cut(scan);
  const int64_t count = pieces.list.size();
  const auto each = [&](const auto& f) {  // of the pieces after the first of their sequence
    for (int64_t n = 0; n < scan.sequences; ++n)
      for (int64_t i = pieces.first[n] + 1; i < pieces.first[n + 1]; ++i) f(i);
  };

  // Row i of `guess`: the state that leaves a piece, looking back; of `state`: the state that enters it, then leaves it.
  Rows factor(scan, count), guess(scan, count), state(scan, count);
  for_blocks(scan, count, [&](int64_t i, int64_t d0, int64_t d1) {
    if (pieces.list[i].end < pieces.list[i].length)
      look_back(scan, k, pieces.list[i], d0, d1, factor.at(i, d0), guess.at(i, d0));
  });
  const int64_t row_bytes = scan.channels * state_bytes(scan);
  for (int64_t n = 0; n < scan.sequences; ++n)
    if (pieces.first[n] < pieces.first[n + 1])
      std::memcpy(state.at(pieces.first[n]), row(scan.final_state, scan, n), row_bytes);
  Rows forgets(scan, 1);  // zeros: a factor
  each([&](int64_t i) {
    k.behind(scan.channels, forgets.at(0), state.at(i - 1), factor.at(i - 1), guess.at(i - 1));
    std::memcpy(state.at(i), guess.at(i - 1), row_bytes);
  });
  const auto scan_piece = scan.events && scan.save ? k.forward_to_events : k.forward;
  for_blocks(scan, count,
             [&](int64_t i, int64_t d0, int64_t d1) { scan_piece(scan, pieces.list[i], d0, d1, state.at(i, d0)); });

  std::vector<int64_t> again;
  each([&](int64_t i) {
    if (!k.absorb(scan.channels, state.at(i - 1), guess.at(i - 1))) return;
    k.absorb(scan.channels, state.at(i - 1), state.at(i));
    again.push_back(i);
  });
  for_blocks(scan, again.size(), [&](int64_t a, int64_t d0, int64_t d1) {
    k.forward(scan, pieces.list[again[a]], d0, d1, guess.at(again[a] - 1, d0));
  });
  for (int64_t n = 0; n < scan.sequences; ++n)
    if (pieces.first[n] < pieces.first[n + 1])
      std::memcpy(row(scan.final_state, scan, n), state.at(pieces.first[n + 1] - 1), row_bytes);
}

// Pieces as maps, and the state (for the adjoint: m) that enters and leaves each.
struct Maps {
  Rows factor, offset, late, entry, exit;
  Maps(const Scan& scan, int64_t count)
      : factor(scan, count),
        offset(scan, count),
        late(scan, count, state_bytes(scan) / (is_complex(scan.dtype) ? 2 : 1)),
        entry(scan, count),
        exit(scan, count) {}

  // Composes the maps of each sequence, in scan order or (direction -1) against it, from rows of `states` [sequences, D].
  void compose(const Scan& scan, const Kernels& k, const Pieces& pieces, int direction, void* states) {
    for (int64_t n = 0; n < scan.sequences; ++n) {
      void* const state = row(states, scan, n);
      const int64_t first = pieces.first[n], end = pieces.first[n + 1];
      for (int64_t i = direction > 0 ? first : end - 1; first <= i && i < end; i += direction) {
        std::memcpy(entry.at(i), state, scan.channels * state_bytes(scan));
        k.apply(scan.channels, factor.at(i), offset.at(i), writes_forget(scan, k), state);
      }
    }
    exit = entry;
  }
  // After the pieces were scanned: the results of the last ones to `states`. False where a piece leaves something else
  // than was handed to the next one: then the call must be scanned whole.
  bool finish(const Scan& scan, const Kernels& k, const Pieces& pieces, int direction, void* states) {
    bool all = true;
    for (int64_t n = 0; n < scan.sequences; ++n) {
      const int64_t first = pieces.first[n], end = pieces.first[n + 1];
      for (int64_t i = direction > 0 ? first : end - 1; first <= i && i < end; i += direction) {
        const int64_t next = i + direction;
        if (first <= next && next < end)
          all = all && k.consistent(scan.channels, writes_forget(scan, k), factor.at(i), offset.at(i), late.at(i),
                                    entry.at(i), exit.at(i), entry.at(next));
        else std::memcpy(row(states, scan, n), exit.at(i), scan.channels * state_bytes(scan));
      }
    }
    return all;
  }
};

// Two passes: pieces as maps, which compose; then the pieces, each from the state that enters it. Packs the events. False
// where the call must be scanned whole.
bool forward_composing(const Scan& scan, const Kernels& k, const Pieces& pieces) {
  const int64_t count = pieces.list.size();
  Maps maps(scan, count);
  for_blocks(scan, count, [&](int64_t i, int64_t d0, int64_t d1) {
    k.summarize(scan, pieces.list[i], d0, d1, maps.factor.at(i, d0), maps.offset.at(i, d0), maps.late.at(i, d0));
  });
  maps.compose(scan, k, pieces, 1, scan.final_state);
  const auto expand = scan.events ? k.forward_from_events : k.forward;
  for_blocks(scan, count,
             [&](int64_t i, int64_t d0, int64_t d1) { expand(scan, pieces.list[i], d0, d1, maps.exit.at(i, d0)); });
  return maps.finish(scan, k, pieces, 1, scan.final_state);
}

// Writes the entry state of each sequence to final_state, which the scan updates in place.
void enter(const Scan& scan, const Kernels& k, const Pieces& pieces) {
  for (int64_t n = 0; n < scan.sequences; ++n) {
    const bool empty = pieces.first[n] == pieces.first[n + 1];
    k.enter(scan, n, /*poison=*/!empty, row(scan.final_state, scan, n));
  }
}

// Returns false, without writing sums, if the call must be scanned whole.
bool differentiate(const Scan& scan, const Kernels& k) {
  const Pieces pieces = cut(scan);
  const int64_t count = pieces.list.size();
  const int64_t states_bytes = scan.sequences * scan.channels * state_bytes(scan);
  if (states_bytes > 0) std::memcpy(scan.grad_initial, scan.grad_final, states_bytes);

  const bool composes = scan.segment > 0;
  Maps maps(scan, composes ? count : 0);
  if (composes) {
    for_blocks(scan, count, [&](int64_t i, int64_t d0, int64_t d1) {
      void* const a = maps.factor.at(i, d0);
      void* const u = maps.offset.at(i, d0);
      if (writes_forget(scan, k)) look_ahead(scan, k, pieces.list[i], d0, d1, a, u);
      else k.summarize_adjoint(scan, pieces.list[i], d0, d1, a, u, maps.late.at(i, d0));
    });
    maps.compose(scan, k, pieces, -1, scan.grad_initial);
  }

  // Several pieces share a row of sums where there are very many.
  const int64_t per_group = std::max<int64_t>(1, ceil_div(count, kGroups)), groups = ceil_div(count, per_group);
  const int sums_per_group = 2 * (1 + scan.inputs);
  Rows sums(scan, groups * sums_per_group);
  for_blocks(scan, groups, [&](int64_t group, int64_t d0, int64_t d1) {
    thread_local std::vector<char> kept;
    const int64_t bytes = scratch_rows(scan.chunk) * (d1 - d0) * state_bytes(scan);
    const std::unique_ptr<char[]> own(bytes > kMostKept ? new char[bytes] : nullptr);
    if (!own && int64_t(kept.size()) < bytes) kept.resize(bytes);
    char* const scratch = own ? own.get() : kept.data();
    for (int64_t i = group * per_group; i < std::min((group + 1) * per_group, count); ++i) {
      const Piece& piece = pieces.list[i];
      void* const m = composes ? maps.exit.at(i, d0) : row(scan.grad_initial, scan, piece.sequence, d0);
      k.backward(scan, piece, d0, d1, m, sums.at(group * sums_per_group, d0), scan.channels, scratch);
    }
  });
  if (composes && !maps.finish(scan, k, pieces, -1, scan.grad_initial)) return false;
  const auto reduce = [&](int which, void* total) {
    if (total) k.reduce(groups, scan.channels, sums_per_group * scan.channels, sums.at(which), total);
  };
  reduce(0, scan.grad_alpha);
  for (int i = 0; i < scan.inputs; ++i) reduce(1 + i, scan.grad_channel[i]);
  return true;
}

}  // namespace

void forward(Scan scan) {
  check_offsets(scan);
  if (scan.sequences == 0 || scan.channels == 0) return;
  if (scan.offsets) {  // sequences leave rows between them
    const int64_t rows = scan.batch * scan.channels;
    if (scan.checkpoints) std::memset(scan.checkpoints, 0, scan.checkpoint_rows * rows * state_bytes(scan));
    if (scan.events) std::memset(scan.events, 0, scan.event_rows * rows * sizeof(int32_t));
  }
  const Ones ones(scan);
  const Kernels& k = kernels(scan);
  Pieces pieces = cut(scan);
  enter(scan, k, pieces);
  const bool few = scan.sequences < torch::stable::get_num_threads() && scan.time >= 2 * kLeastSegment;
  if (writes_forget(scan, k) && (scan.segment > 0 || (few && !is_serial(scan)))) return forward_looking_back(scan, k);
  if (scan.segment > 0) {
    if (forward_composing(scan, k, pieces)) return;
    scan.segment = 0;
    pieces = cut(scan);
    enter(scan, k, pieces);
  }
  for_blocks(scan, pieces.list.size(), [&](int64_t i, int64_t d0, int64_t d1) {
    const Piece& piece = pieces.list[i];  // a sequence: its final state is the running state
    k.forward(scan, piece, d0, d1, row(scan.final_state, scan, piece.sequence, d0));
  });
}

void backward(Scan scan) {
  check_offsets(scan);
  if (scan.channels == 0) return;
  const Ones ones(scan);
  const Kernels& k = kernels(scan);
  if (differentiate(scan, k)) return;
  scan.segment = 0;
  differentiate(scan, k);
}

}  // namespace mru::cpu
