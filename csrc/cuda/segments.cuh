// The kernels that scan the segments of a cut time, a thread for a segment and W channels: each segment as one map of
// the state (`summarize`) or of the adjoint (`summarize_adjoint`), and h from the codes of a segment (`expand`).
#pragma once
#include "../maps/cut.h"
#include "codes.cuh"

namespace mru::cuda {

constexpr int kSegmentThreads = 128;  // of a block
// Blocks that a multiprocessor has registers for. Eight channels with three inputs per channel each take more of them.
template <class F>
constexpr int kSegmentBlocks = F::W == 8 && F::kSums > 2 ? 2 : 3;
// Steps whose inputs a thread holds at once. Eight spill with eight channels, and with wide gates.
template <class F>
constexpr int kSegmentTile = F::W == 8 || F::kWideGates ? 4 : 8;

// The map of a segment as a thread composes it.
template <class F>
struct SegmentMap {
  typename F::States a = all<F>(1), u = all<F>(0);
  Lates<F> late = {};  // recent magnitude of u
  bool head = false;   // whether the map ignores the state on entry (Affine::head)

  __device__ __forceinline__ void store(const Call<F>& call, int64_t segment, int64_t d) const {
    const auto& work = call.work;
    const int64_t channels = call.scan.channels;
    // An op for whole sequences returns a factor that is a number.
    const auto none = call.plan.is_cut() ? Affine<typename F::S>::head(0) : Affine<typename F::S>::constant(0);
    const typename F::States factor = head ? all<F>(none.a) : a;
    store_states<F>(work.factor, segment, channels, d, factor);
    store_states<F>(work.offset, segment, channels, d, u);
    if (work.late) mru::cuda::store<Traffic::kState>(work.late + segment * channels + d, late);
  }
};

// ------------------------------------------------------------------------------------------------ summarize

// Adds the steps of a tile to a map, in pairs of channels, and gives their codes. Returns false and changes nothing if
// an input is NaN.
template <class F, int U>
__device__ __forceinline__ bool add_pairs(const Tile<F, U>& tile, const ChannelInputs<F>& channel,
                                          const typename F::Cell& cell, Vector<int32_t, F::W>& codes,
                                          SegmentMap<F>& map) {
  using S = typename F::S;
  using Of = Selection<F>;
  auto last = Of::none(), squared = Of::all_of(0);
  CodePlanes<F> planes;
#pragma unroll
  for (int t = 0; t < U; ++t)
#pragma unroll
    for (int i = 0; i < F::W / 2; ++i) {
      typename Of::V x[F::kInputs];
      tile.inputs(t, i, channel, x);
      last.at[i] = Of::last(cell, x, last.at[i]);
      planes.add(i, t, cell.writes(x), {cell.value(x, typename Of::V{0}, typename Of::V{kSigns}).bits});
      squared.at[i] = Of::with_squares(x, squared.at[i]);
    }
  if (Of::has_nan(squared)) return false;
  codes = planes.words();
#pragma unroll
  for (int w = 0; w < F::W; ++w) {
    const S s = Of::at(last, w);
    const Affine<S> before{map.a.at[w], map.u.at[w]}, after = is_nan(s) ? before : before.then_overwrite_with(s);
    map.a.at[w] = after.a, map.u.at[w] = after.b;
  }
  return true;
}

// Adds U steps to the map of a thread's channel w. Returns their codes.
template <bool kOverwrites, class F, int U>
__device__ __forceinline__ int add_steps(const Tile<F, U>& tile, const ChannelInputs<F>& channel,
                                         const typename F::Cell& cell, int w, SegmentMap<F>& map) {
  using S = typename F::S;
  constexpr bool kCodes = F::Cell::kCodes;
  S &a = map.a.at[w], &u = map.u.at[w];
  [[maybe_unused]] int codes = 0;
#pragma unroll
  for (int t = 0; t < U; ++t) {
    S x[F::kInputs];
    tile.inputs(t, w, channel, x);
    if constexpr (kCodes) codes |= cell.encode(x) << t;
    if constexpr (kCodes && kOverwrites) continue;
    u = cell.step(x, u);
    a = conj(cell.pull(x, conj(a)));
    if constexpr (!kOverwrites) map.late.at[w] = recent(u, map.late.at[w]);
  }
  if constexpr (kCodes && kOverwrites) {
    const int last = last_of(codes);
    u = cell.step_code(last, u);
    a = cell.pull_code(last, a);
  }
  return codes;
}

// Each segment as one map of the state, and its codes.
template <class F>
__global__ void __launch_bounds__(kSegmentThreads, kSegmentBlocks<F>) summarize(const __grid_constant__ Call<F> call) {
  const Scan& scan = call.scan;
  const auto [segment, d] = place(call);
  if (segment >= call.plan.segments) return;
  const ChannelInputs<F> channel(scan, d);

  SegmentMap<F> map;
  CodeWriter<F> writer(scan, d);
  TilesAhead<F, kSegmentTile<F>> tiles(scan, d);
  with_cell(call, [&]<bool kOverwrites>(const typename F::Cell& cell) {
    Spans spans(call, segment, 1);
    for (Span span{}; spans.next(span);) {
      if (span.enters()) map.u = enter<F>(scan, call.cell, span, d, channel);
      if (span.resets || (call.heads == Heads::kBegin ? span.first : call.heads == Heads::kEnd && span.last))
        map.head = true;
      for_tiles<kSegmentTile<F>>(span.begin, span.end, [&]<int U>(int64_t position) {
        Tile<F, U> tile;
        if constexpr (U > 1) tile = tiles.at(span, position);
        else tile = {scan, span.row(scan), d, position};
        [[maybe_unused]] int before = 0;
        if constexpr (F::Cell::kCodes) before = writer.begin(span.row(scan), position);
        if constexpr (kOverwrites && Selection<F>::kPairs && U > 1) {
          Vector<int32_t, F::W> codes;
          if (add_pairs<F>(tile, channel, cell, codes, map)) {
#pragma unroll
            for (int w = 0; w < F::W; ++w) writer.add(w, before, codes.at[w]);
            return;
          }
        }
#pragma unroll
        for (int w = 0; w < F::W; ++w) {
          [[maybe_unused]] const int codes = add_steps<kOverwrites, F>(tile, channel, cell, w, map);
          if constexpr (F::Cell::kCodes) writer.add(w, before, codes);
        }
      });
    }
  });
  if constexpr (F::Cell::kCodes) writer.end(call.plan.row_of(segment));
  if constexpr (F::Cell::kAdjointSeesState)
    if (call.heads == Heads::kEnd) map.a = conj_all<F>(map.a);  // the factor of the adjoint
  map.store(call, segment, d);
}

// ------------------------------------------------------------------------------------------------ expand

// h of the U steps from `out` on, and the state after them, where writes overwrite and no step is NaN.
template <class F, int U>
__device__ __forceinline__ void expand_copies(const Vector<int32_t, F::W>& codes, const typename F::Cell& cell,
                                              const ChannelInputs<F>& channel, typename F::T* out, int64_t step,
                                              typename F::States& s) {
  using Of = Selection<F, false>;
  using Planes = CodePlanes<F, false>;
  const Planes planes(codes);
  Outputs<F, false> h(cell, channel, s);
#pragma unroll
  for (int t = 0; t < U; ++t, out = advance(out, step)) {
#pragma unroll
    for (int i = 0; i < F::W / Of::kEach; ++i) {
      const auto value = select(Planes::mask(planes.second[i], t), h.second.at[i], h.first.at[i]);
      h.held.at[i] = select(Planes::mask(planes.writes[i], t), value, h.held.at[i]);
    }
    Of::template store_h<Traffic::kPassing>(out, h.held);
  }
#pragma unroll
  for (int w = 0; w < F::W; ++w)
    s.at[w] = cell.step_code(last_of(codes.at[w] & int(((1u << U) - 1) * kCodeMask)), s.at[w]);
}

// The same where writes do not overwrite, or a step is NaN.
template <class F, int U>
__device__ __forceinline__ void expand_steps(const Vector<int32_t, F::W>& codes, const typename F::Cell& cell,
                                             const ChannelInputs<F>& channel, typename F::T* out, int64_t step,
                                             typename F::States& s) {
#pragma unroll 4
  for (int t = 0; t < U; ++t, out = advance(out, step)) {
    typename F::States h;
#pragma unroll
    for (int w = 0; w < F::W; ++w) {
      typename F::S x[F::kInputs];
      channel.at(w, x);
      const typename F::S before = s.at[w];
      s.at[w] = cell.step_code(codes.at[w] >> t & kCodeMask, before);
      h.at[w] = cell.output(x, before, s.at[w]);
    }
    store<Traffic::kPassing>(out, narrow<typename F::T>(h));
  }
}

// h, final states and checkpoints from the codes and the segments' entry states.
template <class F>
__global__ void __launch_bounds__(kSegmentThreads, kSegmentBlocks<F>) expand(const __grid_constant__ Call<F> call) {
  const auto& [scan, plan, work, across, its_cell, heads, unless_zero] = call;
  const typename F::Cell cell = its_cell;
  const auto [segment, d] = place(call);
  if (segment >= plan.segments) return;
  const ChannelInputs<F> channel(scan, d);

  CodesAhead<F> ahead(scan, plan, segment, d, 1);
  Spans spans(call, segment, 1);
  typename F::States s = all<F>(0);
  for (Span span{}; spans.next(span);) {
    if (!span.first && !span.left) s = load_states<F>(work.entry, segment, scan.channels, d);
    Checkpoints<F> checkpoints(scan, plan, span, d);
    checkpoints.pass(span.begin, s);
    if (span.enters()) s = enter<F>(scan, cell, span, d, channel);
    const Row<typename F::T> h(scan, scan.h, span.row(scan), d);
    const auto expand_tile = [&]<int U>(int64_t position) {
      const Vector<int32_t, F::W> codes = ahead.at(position);
      bool copies = cell.overwrites();
#pragma unroll
      for (int w = 0; w < F::W; ++w)
        copies = copies && (codes.at[w] >> 16 & ~codes.at[w] & ((1 << U) - 1)) == 0 && !is_nan(s.at[w]);
      typename F::T* const out = h.at(position);
      if (copies) expand_copies<F, U>(codes, cell, channel, out, h.step, s);
      else expand_steps<F, U>(codes, cell, channel, out, h.step, s);
    };
    for (int64_t position = span.begin; position < span.end;) {
      const int64_t end = checkpoints.end();
      for_tiles<kCodesPerWord>(position, end, expand_tile);
      checkpoints.pass(end, s);
      position = end;
    }
    if (span.last) store_states<F>(scan.final_state, span.sequence, scan.channels, d, s);
  }
  if (work.exit) store_states<F>(work.exit, segment, scan.channels, d, s);
}

// ------------------------------------------------------------------------------------------------ summarize_adjoint

// Composes two maps of the adjoint where writes overwrite: a, m of the steps on the left; right_a, right_m of those on the
// right. Returns whether any channel of the result depends on what comes from the right.
template <class F>
__device__ __forceinline__ bool append(const typename F::States& right_a, const typename F::States& right_m,
                                       typename F::States& a, typename F::States& m) {
  using S = typename F::S;
  bool holds = false;
#pragma unroll
  for (int w = 0; w < F::W; ++w) {
    const auto map = Affine<S>{a.at[w], m.at[w]}.after_selecting({right_a.at[w], right_m.at[w]});
    a.at[w] = map.a, m.at[w] = map.b;
    holds |= a.at[w] != 0;
  }
  return holds;
}

// Reads the steps of a segment for `summarize_adjoint`, from the codes or from the streams.
template <class F, bool kFromCodes>
class AdjointSteps {
 public:
  using S = typename F::S;
  static constexpr int kTile = kFromCodes ? 8 : kSegmentTile<F>;

  __device__ __forceinline__ AdjointSteps(const Call<F>& call, int64_t segment, int64_t d, int direction)
      : scan_(call.scan), d_(d), channel_(call.scan, d), codes_(call.scan, call.plan, segment, d, direction) {}

  // Puts U steps in front of the map of the steps to their right, a and m.
  template <bool kOverwrites, int U>
  __device__ __forceinline__ void pull(const Span& span, int64_t position, const typename F::Cell& cell,
                                       typename F::States& a, typename F::States& m, Lates<F>& late) {
    const Row<const typename F::T> g(scan_, scan_.grad_h, span.row(scan_), d_);
    Vector<typename F::T, F::W> grad[U];
    load_steps<F, U>(g, position, grad);
    [[maybe_unused]] Tile<F, kFromCodes ? 1 : U> tile;
    [[maybe_unused]] Vector<int32_t, F::W> codes;
    if constexpr (kFromCodes) codes = codes_.at(position);
    else tile = Tile<F, U>(scan_, span.row(scan_), d_, position);
#pragma unroll
    for (int t = U - 1; t >= 0; --t) {
#pragma unroll
      for (int w = 0; w < F::W; ++w) {
        S x[F::kInputs];
        if constexpr (kFromCodes) channel_.at(w, x);
        else tile.inputs(t, w, channel_, x);
        const S lambda = cell.cotangent(x, S(0), S(0), widen(grad[t], w), m.at[w]);
        if constexpr (kFromCodes) {
          const int code = codes.at[w] >> t & kCodeMask;
          m.at[w] = cell.pull_code(code, lambda);
          a.at[w] = cell.pull_code(code, a.at[w]);
        } else {
          m.at[w] = cell.pull(x, lambda);
          a.at[w] = cell.pull(x, a.at[w]);
        }
        if constexpr (!kOverwrites) late.at[w] = recent(m.at[w], late.at[w]);
      }
    }
  }

 private:
  const Scan& scan_;
  const int64_t d_;
  const ChannelInputs<F> channel_;
  CodesAhead<F> codes_;
};

// Each segment as one map of m, from the right. Where writes overwrite: from the left up to the first write, because the m
// that leaves the segment does not depend on later steps. No m passes a reset.
template <class F, bool kFromCodes>
__global__ void __launch_bounds__(kSegmentThreads, kSegmentBlocks<F>)
    summarize_adjoint(const __grid_constant__ Call<F> call) {
  using States = typename F::States;
  using Steps = AdjointSteps<F, kFromCodes>;
  const Scan& scan = call.scan;
  const Plan& plan = call.plan;
  const auto [segment, d] = place(call);
  if (segment >= plan.segments) return;

  SegmentMap<F> map;
  with_cell(call, [&]<bool kOverwrites>(const typename F::Cell& cell) {
    constexpr int kDirection = kOverwrites ? 1 : -1;
    Steps steps(call, segment, d, kDirection);
    Spans spans(call, segment, kDirection);
    Span span{};
    if constexpr (kOverwrites) {
      if (!spans.next(span)) return;
      const auto pull = [&]<int U>(int64_t position) {
        States a = all<F>(1), m = all<F>(0);
        steps.template pull<kOverwrites, U>(span, position, cell, a, m, map.late);
        return append<F>(a, m, map.a, map.u);
      };
      bool holds = !span.resets;
      for (int64_t begin = span.begin, end; holds && begin < span.end; begin = end) {
        end = span.end;
        if (scan.grad_checkpoints) {
          const int64_t boundary = span.chunk_begin(scan, plan, begin) + scan.chunk;
          end = boundary < end ? boundary : end;
        }
        holds = for_tiles_while<Steps::kTile>(begin, end, pull);
        if (holds && joins(scan, plan, span, end))
          append<F>(map.a, boundary_grad<F>(scan, plan, span, end, d), map.a, map.u);
      }
      if (holds && span.last)
        append<F>(map.a, load_states<F>(scan.grad_final, span.sequence, scan.channels, d), map.a, map.u);
      map.head = span.last || span.right || span.resets;
    } else {
      const auto pull = [&]<int U>(int64_t position) {
        steps.template pull<kOverwrites, U>(span, position, cell, map.a, map.u, map.late);
      };
      while (spans.next(span)) {
        if (span.last) map.u = load_states<F>(scan.grad_final, span.sequence, scan.channels, d), map.head = true;
        for (int64_t begin, end = span.end; end > span.begin; end = begin) {
          if (joins(scan, plan, span, end)) map.u = add<F>(map.u, boundary_grad<F>(scan, plan, span, end, d));
          begin = span.begin;
          if (scan.grad_checkpoints) {
            const int64_t boundary = span.chunk_begin(scan, plan, end - 1);
            begin = boundary > begin ? boundary : begin;
          }
          for_tiles_from_right<Steps::kTile>(begin, end, pull);
        }
        if (span.resets) map.u = all<F>(0), map.head = true;
      }
    }
  });
  map.store(call, segment, d);
}

}  // namespace mru::cuda
