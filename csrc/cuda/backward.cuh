// `backward`: gradients, tile by tile from the right. Uncut: whole sequences. Cut: from the segments' entry m. The
// states come from those that the forward pass saved.
#pragma once
#include "backward_tile.cuh"

namespace mru::cuda {

template <class F>
class BackwardAgent : public BackwardBase<F> {
  using Base = BackwardBase<F>;
  using Base::call, Base::d, Base::inside, Base::room, Base::segment, Base::span, Base::tile_steps;
  using typename Base::Cell, typename Base::S, typename Base::Single;
  template <class, bool, class>
  friend class BackwardTile;

 public:
  using typename Base::Room;
  static constexpr int kGrad = F::kStreams;  // where grad_h is staged

  __device__ __forceinline__ explicit BackwardAgent(const Call<F>& call) : Base(call) {
#pragma unroll
    for (int i = 0; i < F::kSums; ++i) {
      sums_[i] = all<F>(0);
      sum(i) = lost(i) = all<F>(0);
    }
  }
  // A block takes every sum_rows-th segment, so that it adds to one row of sums.
  __device__ __forceinline__ void run() {
    const Plan& plan = call.plan;
    for (int64_t segment = this->segment; segment < plan.segments; segment += plan.sum_rows) {
      Spans spans(call, segment, -1);
      while (spans.next(span)) scan_span(segment);
      this->store_exit(segment);
    }
    if (plan.sums > 0) store_sums();
  }

 private:
  __device__ __forceinline__ void scan_span(int64_t segment) {
    const Scan& scan = call.scan;
    this->for_block([&](int c, int64_t d) { enter_from_right(segment, c, d); });
    int64_t begin = span.begin - tile_steps;
    if (span.begin < span.end) begin = span.end - 1 - (span.end - 1 - span.start) % tile_steps;
    stage_tile(0, begin);
    for (int tile = 0; begin + tile_steps > span.begin; begin -= tile_steps, ++tile) {
      stage_tile(tile + 1, begin - tile_steps);
      wait_for_copies<1>();
      this->with_part_and_cell(tile, begin, [&]<bool kOverwrites, class Part>(const Part& part, const Cell& cell) {
        constexpr bool kSelects = kOverwrites && !Cell::kAdjointSeesState;
        BackwardTile<F, kSelects, Part>(*this, part, cell).run();
      });
      summed_ += kSteps<F>;
      if (summed_ == kSummed) add_up(), summed_ = 0;
    }
    wait_for_copies<0>();
    if (span.enters() || scan.grad_reset_state)
      this->for_block([&](int c, int64_t d) { leave_to_left(segment, c, d); });
  }
  // m at the right end of the span.
  __device__ __forceinline__ void enter_from_right(int64_t segment, int c, int64_t d) const {
    const Scan& scan = call.scan;
    typename Single::States m{{S(0)}};
    if (span.last) m = load_states<Single>(scan.grad_final, span.sequence, scan.channels, d);
    else if (!span.right) m = load_states<Single>(call.work.entry, segment, scan.channels, d);
    if (joins(scan, call.plan, span, span.end))
      m = add<Single>(m, boundary_grad<Single>(scan, call.plan, span, span.end, d));
    room.carried(c) = m.at[0];
    if (!span.right) room.reset_grad(c) = room.reset_grad_lost(c) = 0;
  }
  // m at the left end: what reaches a reset is a gradient of the reset state and goes no further.
  __device__ __forceinline__ void leave_to_left(int64_t segment, int c, int64_t d) const {
    const Scan& scan = call.scan;
    Sum<S> reset_grad{room.reset_grad(c), room.reset_grad_lost(c)};
    if (span.resets) {
      reset_grad.add(room.carried(c));
      room.carried(c) = 0;
      room.reset_grad(c) = reset_grad.sum, room.reset_grad_lost(c) = reset_grad.lost;
    }
    if (span.first) store_states<Single>(scan.grad_initial, span.sequence, scan.channels, d, {{room.carried(c)}});
    if (!scan.grad_reset_state || span.left) return;
    void* const to = span.whole ? scan.grad_reset_state : call.work.reset_grad;
    const int64_t row = span.whole ? span.sequence : 2 * segment + span.first;
    store_states<Single>(to, row, scan.channels, d, {{reset_grad.total()}});
  }

  // Copies a tile's streams, and the state before its first step, to shared memory.
  __device__ __forceinline__ void stage_tile(int tile, int64_t begin) const {
    if (begin + tile_steps > span.begin) {
      if (inside)
        this->with_part(tile, begin, [&](const auto& part) {
          this->stage_inputs(part);
          this->stage(kGrad, {call.scan, call.scan.grad_h, span.row(call.scan), d}, part);
        });
      this->for_block(
          [&](int c, int64_t d) { stage_state(room.start(tile, c), begin > span.begin ? begin : span.begin, d); });
    }
    commit_copies();
  }
  // The state that enters a position of the span, at one channel. Only a segment of packed sequences may begin where no
  // state is saved.
  __device__ __forceinline__ void stage_state(S& to, int64_t position, int64_t d) const {
    const bool enters = span.enters() && position == span.begin;
    if (!enters && !span.is_boundary(call.scan, call.plan, position)) {
      to = recompute_to(position, d);
      return;
    }
    const S* const from = state_before(enters ? span.start : position, span.resets && enters);
    if (from) copy_ahead<Traffic::kState, 1>(reinterpret_cast<Vector<S, 1>*>(&to), from + d);
    else to = 0;
  }
  // The row of the reset state, of the initial state, which enters the sequence's start, or of a checkpoint. Null: zeros.
  __device__ __forceinline__ const S* state_before(int64_t position, bool is_reset) const {
    const Scan& scan = call.scan;
    if (!is_reset && position > span.start)
      return state_row<const S>(scan.checkpoints, checkpoint_row(scan, call.plan, span, position), scan.channels, 0);
    const S* const states = static_cast<const S*>(is_reset ? scan.reset_state : scan.initial);
    return states ? states + span.sequence * scan.channels : nullptr;
  }
  // The state at a position between two boundaries, scanned from the boundary or the reset before it.
  __device__ __forceinline__ S recompute_to(int64_t position, int64_t d) const {
    const Scan& scan = call.scan;
    int64_t begin = span.chunk_begin(scan, call.plan, position);
    bool is_reset = false;
    if (call.work.reset_bits) {
      const int64_t reset = ResetBits(call.plan, call.work.reset_bits, span.row(scan)).previous(position, begin);
      if (reset >= begin) is_reset = true, begin = reset;
    }
    const S* const from = state_before(begin, is_reset);
    S s = from ? load<Traffic::kState, 1>(from + d).at[0] : S(0), x[F::kInputs];
    ChannelInputs<Single>(scan, d).at(0, x);
#pragma unroll 1
    for (; begin < position; ++begin) {
      const Tile<Single, 1> tile(scan, span.row(scan), d, begin);
      for_streams<Single>([&](int i, int k) { x[i] = widen(tile.raw[0][k], 0); });
      s = call.cell.recompute(x, s);
    }
    return s;
  }

  __device__ __forceinline__ typename F::States& sum(int i) const { return room.own(kBackwardMaps<F> + 2 * i); }
  __device__ __forceinline__ typename F::States& lost(int i) const { return room.own(kBackwardMaps<F> + 2 * i + 1); }

  // Adds the thread's partial sums to its sums in shared memory, and clears them.
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int i = 0; i < F::kSums; ++i) {
#pragma unroll
      for (int w = 0; w < F::W; ++w) {
        Sum<S> total{sum(i).at[w], lost(i).at[w]};
        total.add(sums_[i].at[w]);
        sum(i).at[w] = total.sum, lost(i).at[w] = total.lost;
      }
      sums_[i] = all<F>(0);
    }
  }
  // Adds up the groups' sums. Rows of work.sums are those of the inputs per channel that are given.
  __device__ __forceinline__ void store_sums() {
    add_up();
    __syncthreads();
    int i = 0, row = 0;
#pragma unroll
    for (int input = 0; input < F::kInputs; ++input) {
      if (!F::is_per_channel(input)) continue;
      if (!F::is_optional(input) || call.scan.in[input].channel) {
        const S *const sum = room.row(kBackwardMaps<F> + 2 * i), *const lost = room.row(kBackwardMaps<F> + 2 * i + 1);
        this->for_block([&](int c, int64_t d) {
          Sum<S> all;
          for (int group = 0; group < int(blockDim.y); ++group) {
            const int own = group * room.channels + c;
            all.add(Sum<S>{sum[own], lost[own]}.total());
          }
          store_states<Single>(call.work.sums, segment * call.plan.sums + row, call.scan.channels, d, {{all.total()}});
        });
        ++row;
      }
      ++i;
    }
  }

  typename F::States sums_[F::kSums > 0 ? F::kSums : 1];  // since the last add_up
  int summed_ = 0;                                        // steps added to them
};

template <class F>
__global__ void __launch_bounds__(kTileThreads<F>, kHeld / kTileThreads<F>)
    backward(const __grid_constant__ Call<F> call) {
  if (is_idle(call)) return;
  BackwardAgent<F>(call).run();
}

}  // namespace mru::cuda
