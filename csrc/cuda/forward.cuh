// `forward`: h, final states and checkpoints from the streams. Uncut: whole sequences. Cut: from the segments' entry
// states.
#pragma once
#include "tiles.cuh"

namespace mru::cuda {

template <class F>
class ForwardAgent : public TileAgent<F, F::kStreams, 2, 1> {
  using Base = TileAgent<F, F::kStreams, 2, 1>;
  using Base::call, Base::channel, Base::d, Base::inside, Base::room, Base::segment, Base::span, Base::tile_steps;
  using typename Base::Cell, typename Base::S, typename Base::Single;
  using Of = Selection<F>;

 public:
  using Base::Base;
  using typename Base::Room;

  __device__ __forceinline__ void run() {
    Spans spans(call, segment, 1);
    while (spans.next(span)) {
      const int64_t slot = span.state(call.scan);
      if (call.scan.slots && (slot < 0 || slot >= call.scan.slot_count)) skip_span();
      else scan_span();
    }
    this->store_exit(segment);
  }

 private:
  // The step of a sequence without a slot: h is 0.
  __device__ __forceinline__ void skip_span() const {
    if (inside && threadIdx.y == 0)
      store<Traffic::kStream>(Row<typename F::T>(call.scan, call.scan.h, span.row(call.scan), d).at(span.begin),
                              narrow<typename F::T>(all<F>(0)));
  }
  __device__ __forceinline__ void scan_span() {
    const Scan& scan = call.scan;
    this->for_block([&](int c, int64_t d) {
      typename Single::States s{{room.carried(c)}};
      if (!span.first && !span.left) s = load_states<Single>(call.work.entry, segment, scan.channels, d);
      if (span.resets && saves(span.begin)) save<Single>(span.begin, d, s);
      if (span.enters()) s = enter<Single>(scan, call.cell, span, d, ChannelInputs<Single>(scan, d));
      room.carried(c) = s.at[0];
    });
    int64_t begin = span.begin - (span.begin - span.start) % tile_steps;
    stage_tile(0, begin);
    for (int tile = 0; begin < span.end; begin += tile_steps, ++tile) {
      stage_tile(tile + 1, begin + tile_steps);
      wait_for_copies<1>();
      this->with_part_and_cell(tile, begin, [&]<bool kOverwrites>(const auto& part, const Cell& cell) {
        scan_tile<kOverwrites>(part, cell);
      });
    }
    wait_for_copies<0>();
    if (span.last)
      this->for_block([&](int c, int64_t d) {
        store_states<Single>(scan.final_state, span.state(scan), scan.channels, d, {{room.carried(c)}});
      });
  }

  // Whether the state before a position is a checkpoint.
  __device__ __forceinline__ bool saves(int64_t position) const {
    return call.scan.checkpoints && !(span.first && position == span.begin) &&
           span.is_boundary(call.scan, call.plan, position);
  }
  template <class G>
  __device__ __forceinline__ void save(int64_t position, int64_t d, const typename G::States& s) const {
    const Scan& scan = call.scan;
    store_states<G>(scan.checkpoints, checkpoint_row(scan, call.plan, span, position), scan.channels, d, s);
  }

  __device__ __forceinline__ void stage_tile(int tile, int64_t begin) const {
    if (inside && begin < span.end) this->with_part(tile, begin, [&](const auto& part) { this->stage_inputs(part); });
    commit_copies();
  }

  template <bool kOverwrites, class Part>
  __device__ __forceinline__ void scan_tile(const Part& part, const Cell& cell) {
    bool copies = false;  // whether h is one of two values, or that of the state on entry
    reduce<kOverwrites>(part, cell, copies);
    __syncthreads();
    this->for_block([&](int c, int64_t d) { walk_channel<kOverwrites>(part, cell, c, d); });
    __syncthreads();
    if (inside) store_tile<kOverwrites>(part, cell, copies);
  }

  // The thread's steps as one map, to shared memory.
  template <bool kOverwrites, class Part>
  __device__ __forceinline__ void reduce(const Part& part, const Cell& cell, bool& copies) const {
    if constexpr (!Cell::kComposes) return;
    typename F::States a = all<F>(1), u = all<F>(0);
    if constexpr (kOverwrites && Cell::kCodes) {
      auto last = Of::none(), squared = Of::all_of(0);
#pragma unroll
      for (int t = 0; t < kSteps<F>; ++t)
        this->template for_values<typename Of::V>(part.tile, t, [&](int i, const auto* x) {
          last.at[i] = Of::last(cell, x, last.at[i]);
          squared.at[i] = Of::with_squares(x, squared.at[i]);
        });
      copies = !Of::has_nan(squared);
      if (copies) Of::as_map(last, a, u);
    }
#pragma unroll
    for (int t = 0; t < kSteps<F>; ++t)
      if (!copies && part.has(t))
        this->for_channels(part.tile, t, [&](int w, const S* x) {
          u.at[w] = cell.step(x, u.at[w]);
          a.at[w] = conj(pull_at(cell, x, S(0), conj(a.at[w])));
        });
    room.own(0) = a, room.own(1) = u;
  }

  // Offsets of the groups at a channel become the states that enter them.
  template <bool kOverwrites, class Part>
  __device__ __forceinline__ void walk_channel(const Part& part, const Cell& cell, int c, int64_t d) const {
    S *const factors = room.row(0) + c, *const values = room.row(1) + c;
    S& carried = room.carried(c);
    if constexpr (kOverwrites) {  // values are copied
      carried = walk(factors, values, room.channels, int(blockDim.y), carried);
    } else {
      const Column<F, Base> column{*this, part.tile, part.begin, c, d};
      const auto scan = [&](S s) {
        return column.scan_steps(room.row(1), 1, s, [&](int, const S* x, S s) { return cell.step(x, s); });
      };
      if constexpr (!Cell::kComposes) carried = scan(carried);
      else carried = walk_or_scan<false>(factors, values, room.channels, int(blockDim.y), carried, scan);
    }
  }

  // h of the thread's steps, and the state that enters them if it is a checkpoint.
  template <bool kOverwrites, class Part>
  __device__ __forceinline__ void store_tile(const Part& part, const Cell& cell, bool copies) const {
    typename F::States s = room.own(1);
    if (part.has(0) && !(span.resets && part.position == span.begin) && saves(part.position))
      save<F>(part.position, d, s);
    const Row<typename F::T> h(call.scan, call.scan.h, span.row(call.scan), d);
    typename F::T* out = h.at(part.position);
    if constexpr (kOverwrites && Cell::kCodes) {
#pragma unroll
      for (int w = 0; w < F::W; ++w) copies = copies && !is_nan(s.at[w]);
      if (copies) return store_copies(part, cell, s, out, h.step);
    }
#pragma unroll
    for (int t = 0; t < kSteps<F>; ++t, out = advance(out, h.step))
      if (part.has(t)) {
        typename F::States values;
        this->for_channels(part.tile, t, [&](int w, const S* x) {
          const S before = s.at[w];
          s.at[w] = cell.step(x, before);
          values.at[w] = cell.output(x, before, s.at[w]);
        });
        store<Traffic::kStream>(out, narrow<typename F::T>(values));
      }
  }
  template <class Part>
  __device__ __forceinline__ void store_copies(const Part& part, const Cell& cell, const typename F::States& s,
                                               typename F::T* out, int64_t step) const {
    Outputs<F> h(cell, channel, s);
#pragma unroll
    for (int t = 0; t < kSteps<F>; ++t, out = advance(out, step)) {
      this->template for_values<typename Of::V>(part.tile, t, [&](int i, const auto* x) {
        h.held.at[i] = select(cell.writes(x), cell.value(x, h.first.at[i], h.second.at[i]), h.held.at[i]);
      });
      Of::store_h(out, h.held);
    }
  }
};

template <class F>
__global__ void __launch_bounds__(kTileThreads<F>, kHeld / kTileThreads<F>)
    forward(const __grid_constant__ Call<F> call) {
  if (is_idle(call)) return;
  ForwardAgent<F>(call).run();
}

}  // namespace mru::cuda
