// The backward kernel: chunk by chunk from the right, it recomputes the states of a chunk from the checkpoint on its left
// and then goes left through the chunk.
#pragma once
#include "../../sum.h"
#include "rows.h"

namespace mru {
namespace {

// kWithSums: whether gradients of inputs per channel that are not optional are summed over time.
template <class F, int kTile, bool kWithSums>
struct Backward {
  using T = typename F::T;
  using S = typename F::S;
  using Value = typename F::Value;
  using Cell = typename F::Cell;
  static constexpr int kInputs = F::kInputs;
  static constexpr int64_t kSecondLevel = 1 << 20;  // bytes that the prefetch assumes; measured with 2 MiB

  const Scan& scan;
  const Segment& segment;
  const int64_t d0, n, chunk;
  const Cell cell;
  S* const m;           // [n]
  S* const states;      // [chunk + 1, n]: before the first step, after each
  S* const chunk_sums;  // [F::kSums, n]: sums of at most kSummed terms
  S* const sums;        // [2 F::kSums, stride]
  const int64_t stride;
  const bool fits;       // whether the streams of two chunks fit into the second-level cache
  bool summed[kInputs];  // whether the gradient of an optional input per channel is wanted
  LateRow<F> recently;
  CarriedRow<F> carried_m, carried_sum[kInputs];

  // At the current row.
  Inputs<F> in;
  Row<const T> g;
  ResultRow<F, kTile> dx_row[kInputs];

  MRU_INLINE Backward(const Scan& scan, const Segment& segment, int64_t d0, int64_t d1, void* carry, void* sums,
                      int64_t stride, void* scratch, void* late)
      : scan(scan),
        segment(segment),
        d0(d0),
        n(d1 - d0),
        chunk(scan.chunk),
        cell(scan.scalars),
        m(static_cast<S*>(carry)),
        states(static_cast<S*>(scratch)),
        chunk_sums(states + (chunk + 1) * n),
        sums(static_cast<S*>(sums)),
        stride(stride),
        fits(kTile > 1 || 2 * (2 * F::kStreams + 1) * int64_t(sizeof(T)) * n * chunk <= kSecondLevel),
        recently(Cell::kAdjointSeesState ? late : nullptr, n),
        carried_m(m, n),
        in(scan, segment, segment.begin, d0) {
    for (int i = 0; i < kInputs; ++i) summed[i] = scan.grad_channel[i] != nullptr;
  }

  MRU_INLINE bool sums_up(int i) const { return F::per_channel(i) && (F::is_optional(i) ? summed[i] : kWithSums); }

  MRU_INLINE void run() {
    for (int64_t end = segment.end; end > segment.begin;) {
      const int64_t of_chunk = (end - 1) / chunk * chunk, begin = of_chunk > segment.begin ? of_chunk : segment.begin;
      if (scan.grad_checkpoints && is_boundary(scan, segment, end)) join(end);
      enter(begin);
      recompute(begin, end, /*is_first=*/end == segment.end);
      go_left(begin, end, /*has_next=*/begin > segment.begin);
      end = begin;
    }
  }

  // The gradient of the saved state after the steps before `end` joins m.
  MRU_INLINE void join(int64_t end) {
    const S* const grad = boundary_row<S>(scan, scan.grad_checkpoints, segment, end, d0);
    for_lanes<F>(n, [&](auto lanes, int64_t j) {
      carried_m.put(lanes, m + j, carried_m.get(lanes, m + j) + load(lanes, grad + j));
    });
  }

  MRU_INLINE void enter(int64_t begin) {
    const bool resets = segment.resets && begin == segment.begin;
    const S* entry = static_cast<const S*>(resets ? scan.reset_state : scan.initial);
    if (begin > 0 && !resets) entry = boundary_row<S>(scan, scan.checkpoints, segment, begin, d0);
    else if (entry) entry += segment.sequence * scan.channels + d0;
    for (int64_t j = 0; j < n; ++j) states[j] = entry ? entry[j] : S(0);
    for (int64_t j = 0; j < F::kSums * n; ++j) chunk_sums[j] = 0;
    for (auto& sum : carried_sum) sum = {};

    in = Inputs<F>(scan, segment, begin, d0);
    g = {scan, scan.grad_h, segment, begin, d0};
    for (int i = 0; i < kInputs; ++i)
      if (F::is_stream(i)) dx_row[i] = {scan, scan.grad_in[i], segment, begin, d0, n};
  }
  MRU_INLINE void advance(int64_t steps) {
    in.advance(steps);
    g.advance(steps);
    for (int i = 0; i < kInputs; ++i)
      if (F::is_stream(i)) dx_row[i].advance(steps);
  }
  MRU_INLINE void fetch_inputs(int64_t ahead, int64_t j) const {
    for (int i = 0; i < kInputs; ++i)
      if (F::is_stream(i)) __builtin_prefetch(in.row[i].ahead(ahead) + j, 0, 2);
  }
  // The rows of grad_h and of the streams' gradients.
  MRU_INLINE void fetch_gradients(int64_t ahead, int64_t j) const {
    __builtin_prefetch(g.ahead(ahead) + j, 0, 2);
    for (int i = 0; i < kInputs; ++i)
      if (F::is_stream(i)) dx_row[i].template prefetch<2>(ahead, j);
  }

  // Fills `states`. Prefetches the gradients' rows for go_left, unless go_left of the chunk on the right has done so: it
  // prefetches the inputs of the next chunk and, if `fits`, also its gradients' rows.
  MRU_INLINE void recompute(int64_t begin, int64_t end, bool is_first) {
    CarriedRow<F> carried_s(states, n);
    for (int64_t step = begin; step < end;) {
      const int64_t steps = tile_of<kTile>(step, end);
      S* const before = states + (step - begin) * n;
      for_lanes<F>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
        const InputLanes<F, L> inputs(in, lanes, j);
        Value s = carried_s.get(lanes, before + j);
        for (int64_t i = 0; i < steps; ++i) {
          Value x[kInputs];
          inputs.load_at(i, x);
          if constexpr (kTile == 1) inputs.prefetch(kRowsAhead);
          if (kTile == 1 && (is_first || !fits)) fetch_gradients(i, j);
          s = cell.recompute(x, s);
          carried_s.put(lanes, before + (i + 1) * n + j, s);
        }
      });
      advance(steps);
      step += steps;
    }
  }

  MRU_INLINE void go_left(int64_t begin, int64_t end, bool has_next) {
    const int64_t summed_from = begin - begin % kCodesPerWord;  // a multiple of the tile
    // Where rows adjoin, those of the chunk on the left are prefetched in the order of memory, which the hardware follows.
    const bool rises = kTile == 1 && g.step == n;
    for (int64_t right = end; right > begin;) {
      const int64_t steps = tile_before<kTile>(right, begin);
      advance(-steps);
      right -= steps;
      const S* const before = states + (right - begin) * n;
      const int64_t mirrored = (begin - chunk) + (end - 1) - 2 * right;
      for_lanes<F>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
        const InputLanes<F, L> inputs(in, lanes, j);
        Value pulled = carried_m.get(lanes, m + j), after = load(lanes, before + steps * n + j), sum[kInputs] = {};
        for (int k = 0; k < kInputs; ++k)
          if (sums_up(k)) sum[k] = carried_sum[k].get(lanes, chunk_sums + F::sum_row(k) * n + j);
        for (int64_t i = steps; i-- > 0;) {
          Value x[kInputs], dx[kInputs];
          inputs.load_at(i, x);
          const Value grad = load(lanes, g.ahead(i) + j);
          const Value s = load(lanes, before + i * n + j);
          pulled = cell.vjp(x, s, after, grad, pulled, dx);
          after = s;
          for (int k = 0; k < kInputs; ++k) {
            if (sums_up(k)) sum[k] += dx[k];
            if (F::is_stream(k)) dx_row[k].put(lanes, i, j, dx[k]);
          }
          if constexpr (Cell::kAdjointSeesState)
            if (recently.wants(right + i - segment.begin)) note_late(lanes, j, pulled);
          if (has_next) {
            const int64_t ahead = rises ? mirrored - i : i - chunk;
            fetch_inputs(ahead, j);
            if (fits) fetch_gradients(ahead, j);
          }
        }
        carried_m.put(lanes, m + j, pulled);
        for (int k = 0; k < kInputs; ++k)
          if (sums_up(k)) carried_sum[k].put(lanes, chunk_sums + F::sum_row(k) * n + j, sum[k]);
      });
      if ((right - summed_from) % kSummed == 0 || right == begin) add_up_chunk();
    }
  }
  template <class L>
  MRU_INLINE void note_late(L lanes, int64_t j, Value pulled) {
    recently.put(lanes, j, recent(pulled, recently.get(lanes, j)));
  }

  MRU_INLINE void add_up_chunk() {
    for (int k = 0; k < kInputs; ++k) {
      if (!sums_up(k)) continue;
      S* const sum = sums + F::sum_row(k) * stride;
      add_up(chunk_sums + F::sum_row(k) * n, sum, sum + F::kSums * stride);
      carried_sum[k] = {};
    }
  }
  // Adds `partial` [n] to the compensated sums (`sum`, `lost`) and sets it to 0.
  MRU_INLINE void add_up(S* partial, S* sum, S* lost) const {
    for_lanes<F>(n, [&](auto lanes, int64_t j) {
      Sum<Value> all{load(lanes, sum + j), load(lanes, lost + j)};
      all.add(load(lanes, partial + j));
      store(lanes, sum + j, all.sum);
      store(lanes, lost + j, all.lost);
      store(lanes, partial + j, Value{});
    });
  }
};

template <class F>
void backward(const Scan& scan, const Segment& segment, int64_t d0, int64_t d1, void* carry, void* sums, int64_t stride,
              void* scratch, void* late) {
  bool sums_up = false;
  for (int i = 0; i < F::kInputs; ++i) sums_up |= F::kRequired >> i & 1 && scan.grad_channel[i] != nullptr;
  with_tile(d1 - d0, [&]<int kTile>() {
    const auto run = [&]<bool kWithSums>() __attribute__((always_inline)) {
      Backward<F, kTile, kWithSums>(scan, segment, d0, d1, carry, sums, stride, scratch, late).run();
    };
    if constexpr (F::kRequired != 0)
      if (sums_up) return run.template operator()<true>();
    run.template operator()<false>();
  });
}

template <class F>
void reduce(int64_t n, int64_t rows, int64_t stride, int64_t to_lost, const void* sums, void* total) {
  using S = typename F::S;
  for_lanes<F>(n, [&](auto lanes, int64_t j) {
    Sum<typename F::Value> all;
    const S* at = static_cast<const S*>(sums) + j;
    for (int64_t r = 0; r < rows; ++r, at += stride)
      all.add(Sum<typename F::Value>{load(lanes, at), load(lanes, at + to_lost)}.total());
    store(lanes, static_cast<S*>(total) + j, all.total());
  });
}

}  // namespace
}  // namespace mru
