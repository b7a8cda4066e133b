// The kernels that read the streams and write what is asked for. A block scans a job tile after tile, so that every
// stream is read once:
//
//   group, lane   y and x of a thread: its kSteps steps of the tile, one after another; its W channels
//   tile          groups x kSteps scan positions of the row, aligned; while one is worked on the next is copied to
//                 shared memory, of which a thread reads only what it copied itself
//   walk          from group to group, over what each makes of its steps as one map: a thread a channel
//
// Steps outside a span change nothing: their group's map is the identity. Where applying maps leaves the range of the
// dtype, the steps are scanned instead: see walk_or_scan.
#pragma once
#include "kernels.cuh"

namespace mru::cuda {

// Steps of a thread in a tile: as many as its registers bear.
template <class F>
constexpr int kSteps = (F::kInputs == 3 && F::kSums > 1) || sizeof(typename F::S) == 16 ? 4 : 8;
constexpr int kTile = 64, kLongTile = 128;  // steps, or what comes near
constexpr int64_t kManyBlocks = 512;        // from which on the short tile is enough to fill a device

constexpr int kHeld = 256;  // threads that a multiprocessor is to have registers for, at least

// Threads side by side: 256 bytes of a row where each moves 16.
template <class F>
constexpr int kRowLanes = kSteps<F> < 8 ? 8 : 16;
template <class F>
constexpr int kTileThreads = kRowLanes<F> * kLongTile / kSteps<F>;  // of a block, at most

// How a block is cut: by sizes, as the order of every sum follows from it, and by the shared memory that a block may have.
struct Tiling {
  int lanes, groups;
  int64_t across;  // blocks of a job

  // Where a row has more than one tile, they begin where states are saved. bytes(lanes, groups) must not exceed `most`.
  template <class Bytes>
  Tiling(const Scan& scan, int64_t jobs, int row_lanes, int width, int steps, int64_t most, Bytes bytes)
      : lanes(row_lanes) {
    const auto blocks = [&] { return (scan.channels + lanes * width - 1) / (lanes * width); };
    const auto groups_of = [&](int64_t tile) {
      const int64_t whole = tile / scan.chunk * scan.chunk / steps, all = (scan.time + steps - 1) / steps;
      return int(std::max<int64_t>(scan.time < tile ? all : whole, 1));
    };
    while (lanes > 1 && lanes / 2 * width >= scan.channels) lanes /= 2;
    groups = groups_of(jobs * blocks() >= kManyBlocks ? kTile : kLongTile);
    if (bytes(lanes, groups) > most) groups = groups_of(kTile);
    while (bytes(lanes, groups) > most && lanes > 1) lanes /= 2;
    while (lanes * groups < 64) lanes *= 2;
    across = blocks();
  }
};

// Shared memory of a block: kMaps rows of a vector of states a thread; kCarried rows of a state a channel; then, warp by
// warp, what is staged of two tiles, kStaged vectors of elements a step and thread.
template <class F, int kStaged, int kMaps, int kCarried>
class TileRoom {
 public:
  using S = typename F::S;
  using Elements = Vector<typename F::T, F::W>;

  static int64_t bytes(int lanes, int groups) {
    const int64_t threads = lanes * groups, warps = (threads + kWarp - 1) / kWarp;
    return (kMaps * threads + kCarried * lanes) * sizeof(typename F::States) +
           warps * kWarp * kSlots * sizeof(Elements);
  }
  __device__ __forceinline__ TileRoom()
      : threads(int(blockDim.x * blockDim.y)),
        thread(int(threadIdx.y * blockDim.x + threadIdx.x)),
        channels(int(blockDim.x) * F::W),
        maps_(reinterpret_cast<S*>(shared_memory())),
        carried_(maps_ + kMaps * threads * F::W),
        staged_(reinterpret_cast<Elements*>(carried_ + kCarried * channels) + thread / kWarp * (kWarp * kSlots) +
                thread % kWarp) {}

  const int threads, thread, channels;
  // Row i of the maps, [groups, channels]; and the thread's own part of it.
  __device__ __forceinline__ S* row(int i) const { return maps_ + i * threads * F::W; }
  __device__ __forceinline__ typename F::States& own(int i) const {
    return reinterpret_cast<typename F::States*>(row(i))[thread];
  }
  // What a walk hands on from tile to tile; and with what one starts in a tile, if that is not handed on.
  __device__ __forceinline__ S& carried(int channel) const { return carried_[channel]; }
  __device__ __forceinline__ S& start(int tile, int channel) const {
    static_assert(kCarried == 3);
    return carried_[(1 + (tile & 1)) * channels + channel];
  }
  __device__ __forceinline__ Elements& staged(int tile, int k, int t) const { return staged_[slot(tile, k, t)]; }
  // The element staged by thread `other`; call after a barrier.
  __device__ __forceinline__ const Elements& staged_by(int other, int tile, int k, int t) const {
    Elements* const first = reinterpret_cast<Elements*>(carried_ + kCarried * channels);
    return first[other / kWarp * (kWarp * kSlots) + other % kWarp + slot(tile, k, t)];
  }

 private:
  static constexpr int kWarp = 32, kSlots = 2 * kStaged * kSteps<F>;
  static __device__ __forceinline__ int slot(int tile, int k, int t) {
    return (((tile & 1) * kStaged + k) * kSteps<F> + t) * kWarp;
  }
  S *const maps_, *const carried_;
  Elements* const staged_;
};

template <class F>
using ForwardRoom = TileRoom<F, F::kStreams, 2, 1>;
template <class F>
constexpr int kBackwardMaps = RealOf<typename F::S>::is_complex ? 4 : 3;
// After the maps, of each sum over time: the sum, and what it has lost (Sum, lanes.h).
template <class F>
using BackwardRoom = TileRoom<F, F::kStreams + 1, kBackwardMaps<F> + 2 * F::kSums, 3>;

// Adds a thread's partial sums to its sums in shared memory, and clears them.
template <class F>
__device__ __forceinline__ void add_up(const BackwardRoom<F>& room, typename F::States* partial) {
#pragma unroll
  for (int i = 0; i < F::kSums; ++i) {
    auto &sum = room.own(kBackwardMaps<F> + 2 * i), &lost = room.own(kBackwardMaps<F> + 2 * i + 1);
#pragma unroll
    for (int w = 0; w < F::W; ++w) {
      Sum<typename F::S> total{sum.at[w], lost.at[w]};
      total.add(partial[i].at[w]);
      sum.at[w] = total.sum, lost.at[w] = total.lost;
    }
    partial[i] = all<F>(0);
  }
}

// What a thread does in the blocks of one launch.
template <class F>
struct TilePlace {
  int64_t job, first, d;  // the first channel of the block, and of the thread
  bool inside;            // whether the thread has channels
  int64_t tile_steps;

  __device__ __forceinline__ explicit TilePlace(const Call<typename F::S>& call) {
    const int64_t across = call.across.divisor();
    job = call.across(blockIdx.x);
    first = (int64_t(blockIdx.x) - job * across) * blockDim.x * F::W;
    d = first + int64_t(threadIdx.x) * F::W;
    inside = d < call.scan.channels;
    if (!inside) d = 0;
    tile_steps = int64_t(blockDim.y) * kSteps<F>;
  }
};

// The steps [low, high) of a thread in a tile that lie in a span. kWhole: all, as those of all threads do.
template <class F, bool kWhole>
struct Part {
  static constexpr int K = kSteps<F>;
  int64_t position;  // of step 0
  int low, high;
  __device__ __forceinline__ Part(const Span& span, int64_t tile)
      : position(tile + int64_t(threadIdx.y) * K),
        low(span.begin > position ? int(span.begin - position < K ? span.begin - position : K) : 0),
        high(span.end <= position ? 0 : (span.end - position < K ? int(span.end - position) : K)) {}
  __device__ __forceinline__ bool has(int t) const { return kWhole || (low <= t && t < high); }
};
// Calls each(part) for a tile.
template <class F, class Each>
__device__ __forceinline__ void with_part(const Span& span, int64_t tile, int64_t tile_steps, Each each) {
  if (span.begin <= tile && tile + tile_steps <= span.end) each(Part<F, true>(span, tile));
  else each(Part<F, false>(span, tile));
}
// Calls each(part, cell) for a tile.
template <class F, class Each>
__device__ __forceinline__ void with_part_and_cell(const Span& span, int64_t tile, int64_t tile_steps,
                                                   const Call<typename F::S>& call, Each each) {
  using Cell = typename F::Cell;
  with_part<F>(span, tile, tile_steps, [&]<bool kWhole>(const Part<F, kWhole>& part) {
    if constexpr (kWhole)
      with_cell<Cell>(call, [&]<bool kForgets>(const Cell& cell) { each.template operator()<kForgets>(part, cell); });
    else each.template operator()<false>(part, Cell(call.scan.epsilon, call.surrogate));
  });
}

template <class F, class Room, class Part>
__device__ __forceinline__ void stage(const Room& room, int k, int tile, const Row<const typename F::T>& stream,
                                      const Part& part) {
  const typename F::T* at = stream.at(part.position);
#pragma unroll
  for (int t = 0; t < kSteps<F>; ++t, at = advance(at, stream.step))
    if (part.has(t)) copy_ahead<Traffic::kStream, F::W>(&room.staged(tile, k, t), at);
}
template <class F, class Room, class Part>
__device__ __forceinline__ void stage_inputs(const Room& room, int tile, const Scan& scan, int64_t row, int64_t d,
                                             const Part& part) {
  for_streams<F>([&](int i, int k) { stage<F>(room, k, tile, {scan, scan.in[i].stream, row, d}, part); });
}
// Calls each(i, x) for the thread's channels, in values V: x are the inputs of its step t at the i-th value.
template <class V, class F, class Room, class Each>
__device__ __forceinline__ void for_values(const Room& room, int tile, int t, const ChannelInputs<F>& channel,
                                           Each each) {
  Tile<F, 1> inputs;
  for_streams<F>([&](int, int k) { inputs.raw[0][k] = read_again(room.staged(tile, k, t)); });
#pragma unroll
  for (int i = 0; i < F::W / kElements<V>; ++i) {
    V x[F::kInputs];
    inputs.inputs(0, i, channel, x);
    each(i, x);
  }
}
template <class F, class Room, class Each>
__device__ __forceinline__ void for_channels(const Room& room, int tile, int t, const ChannelInputs<F>& channel,
                                             Each each) {
  for_values<typename F::S, F>(room, tile, t, channel, each);
}

// The state before a span's first step in a tile, at one channel, to where a walk starts: given, or saved by the forward
// pass. It arrives with the tile.
template <class S>
__device__ __forceinline__ void stage_state(S& to, const Scan& scan, const Plan& plan, const Span& span, int64_t begin,
                                            int64_t d) {
  const S* const states = static_cast<const S*>(scan.initial);
  const S* from = states ? states + span.sequence * scan.channels : nullptr;
  if (!span.first || begin > span.begin)
    from = state_row<const S>(scan.checkpoints, checkpoint_row(scan, plan, span, begin), scan.channels, 0);
  if (from) copy_ahead<Traffic::kState, 1>(reinterpret_cast<Vector<S, 1>*>(&to), from + d);
  else to = 0;
}

// Stores the state that leaves the job, for `check`.
template <class F, class Room>
__device__ __forceinline__ void leave(const Room& room, const Call<typename F::S>& call, int64_t first, int64_t job) {
  const int64_t channels = call.scan.channels;
  if (call.work.exit && call.plan.chunked())
    for (int c = room.thread; c < room.channels && first + c < channels; c += room.threads)
      store_states<typename F::Single>(call.work.exit, job, channels, first + c, {{room.carried(c)}});
}

// A channel of a tile, scanned step by step by one thread when composing maps leaves the range.
template <class F, class Room>
struct Column {
  using S = typename F::S;
  const Room& room;
  const Scan& scan;
  const Span& span;
  int tile;
  int64_t position;  // of the tile
  int channel;
  int64_t d;

  // values[group, channel] becomes what enters a group, in scan order or (direction -1) from the right. Returns what leaves
  // the last. each(other, t, x, s): returns the state after step t of thread `other`, given inputs x and state s.
  template <class Each>
  __device__ __forceinline__ S scan_steps(S* values, int direction, S s, Each each) const {
    S x[F::kInputs];
    for_channel_inputs([&](int i, const S* from) { x[i] = load<Traffic::kState, 1>(from + d).at[0]; });
    const int steps = int(blockDim.y) * kSteps<F>;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int step = direction > 0 ? i : steps - 1 - i, group = step / kSteps<F>, t = step % kSteps<F>;
      const int other = group * int(blockDim.x) + channel / F::W;
      if (i % kSteps<F> == 0) values[group * room.channels + channel] = s;
      if (position + step < span.begin || position + step >= span.end) continue;
      for_streams<F>([&](int i, int k) { x[i] = element(other, k, t); });
      s = each(other, t, x, s);
    }
    return s;
  }
  // The element of the k-th staged stream.
  __device__ __forceinline__ S element(int other, int k, int t) const {
    return widen(room.staged_by(other, tile, k, t).at[channel % F::W]);
  }

 private:
  template <class Each>
  __device__ __forceinline__ void for_channel_inputs(Each each) const {
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i)
      if (F::per_channel(i)) each(i, static_cast<const S*>(scan.in[i].channel));
  }
};

// `walk` from `carried`. If a value is not finite, calls the slow but exact scan(s) instead. A NaN on entry stays. Where
// `kForgets` nothing is multiplied by a factor 0.
template <bool kForgets, class S, class ScanSteps>
__device__ __forceinline__ S walk_or_scan(const S* factors, S* values, int stride, int count, S carried,
                                          ScanSteps scan) {
  using Real = typename RealOf<S>::type;
  S finite = 0;
  const S left = walk(factors, values, stride, count, carried, [&](S a, S u, S s) {
    const S next = kForgets ? apply(a, u, s) : product_sum(a, s, u);
    finite = product_sum(Real(0), next, finite);
    return next;
  });
  return is_nan(finite) && !is_nan(carried) ? scan(carried) : left;
}

// h, final states and checkpoints from the streams. Wide: whole sequences. Chunked: from the jobs' entry states.
template <class F>
__global__ void __launch_bounds__(kTileThreads<F>, kHeld / kTileThreads<F>)
    forward(const __grid_constant__ Call<typename F::S> call) {
  using S = typename F::S;
  using Single = typename F::Single;
  if (is_idle(call)) return;
  const auto& [scan, plan, work, across, surrogate, unless_zero] = call;
  const TilePlace<F> at(call);
  const ForwardRoom<F> room;
  const ChannelInputs<F> channel(scan, at.d);
  const typename F::States alpha = load_alpha<F>(scan, at.d);

  Spans spans(scan, plan, at.job, 1);
  for (Span span; spans.next(span);) {
    const Row<typename F::T> h(scan, scan.h, span.row, at.d);
    const int64_t begin = span.begin / at.tile_steps * at.tile_steps;
    for (int c = room.thread; c < room.channels && at.first + c < scan.channels; c += room.threads) {
      const int64_t d = at.first + c;
      room.carried(c) = (span.first ? enter<Single>(scan, span, d, load_alpha<Single>(scan, d))
                                    : load_states<Single>(work.entry, at.job, scan.channels, d))
                            .at[0];
    }
    const auto stage_tile = [&](int tile, int64_t position) {
      if (at.inside && position < span.end)
        with_part<F>(span, position, at.tile_steps,
                     [&](const auto& part) { stage_inputs<F>(room, tile, scan, span.row, at.d, part); });
      commit_copies();
    };
    const auto scan_tile = [&]<bool kForgets>(int tile, int64_t position, const auto& part, const auto& cell) {
      typename F::States a = all<F>(1), u = all<F>(0);
      bool copies = false;  // h is one of two values, or what entered
      if constexpr (kForgets && F::Cell::kEvents) {
        auto last = Writes<F>::none(), squared = Writes<F>::all_of(0);
#pragma unroll
        for (int t = 0; t < kSteps<F>; ++t)
          for_values<typename Writes<F>::V>(room, tile, t, channel, [&](int i, const auto* x) {
            last.at[i] = Writes<F>::last(cell, x, last.at[i]);
#pragma unroll
            for (int k = 0; k < F::kInputs; ++k) squared.at[i] = squares(x[k], squared.at[i]);
          });
        copies = !Writes<F>::has_nan(squared);
        if (copies) Writes<F>::as_map(last, a, u);
      }
#pragma unroll
      for (int t = 0; t < kSteps<F>; ++t)
        if (!copies && part.has(t))
          for_channels<F>(room, tile, t, channel, [&](int w, const S* x) {
            u.at[w] = cell.step(x, u.at[w]);
            a.at[w] = conj(cell.pull(x, conj(a.at[w])));
          });
      room.own(0) = a, room.own(1) = u;
      __syncthreads();
      for (int c = room.thread; c < room.channels && at.first + c < scan.channels; c += room.threads) {
        S *const factors = room.row(0) + c, *const values = room.row(1) + c;
        if constexpr (kForgets) {  // values are copied
          room.carried(c) = walk(factors, values, room.channels, int(blockDim.y), room.carried(c), apply<S>);
        } else {
          const auto scan_steps = [&](S s) {
            return Column<F, ForwardRoom<F>>{room, scan, span, tile, position, c, at.first + c}.scan_steps(
                room.row(1), 1, s, [&](int, int, const S* x, S s) { return cell.step(x, s); });
          };
          room.carried(c) =
              walk_or_scan<false>(factors, values, room.channels, int(blockDim.y), room.carried(c), scan_steps);
        }
      }
      __syncthreads();
      if (!at.inside) return;
      typename F::States s = room.own(1);
      if (scan.checkpoints && part.has(0) && plan.chunk_divisor(part.position) * scan.chunk == part.position &&
          !(span.first && part.position == span.begin))
        store_states<F>(scan.checkpoints, checkpoint_row(scan, plan, span, part.position), scan.channels, at.d, s);
      typename F::T* out = h.at(part.position);
      if constexpr (kForgets && F::Cell::kEvents) {
#pragma unroll
        for (int w = 0; w < F::W; ++w) copies = copies && !is_nan(s.at[w]);
        if (copies) {
          const auto first = Writes<F>::first(alpha), second = Writes<F>::second(alpha);
          auto held = Writes<F>::h(alpha, s);
#pragma unroll
          for (int t = 0; t < kSteps<F>; ++t, out = advance(out, h.step)) {
            for_values<typename Writes<F>::V>(room, tile, t, channel, [&](int i, const auto* x) {
              held.at[i] = select(cell.writes(x), cell.value(x, first.at[i], second.at[i]), held.at[i]);
            });
            Writes<F>::store_h(out, held);
          }
          return;
        }
      }
#pragma unroll
      for (int t = 0; t < kSteps<F>; ++t, out = advance(out, h.step))
        if (part.has(t)) {
          for_channels<F>(room, tile, t, channel, [&](int w, const S* x) { s.at[w] = cell.step(x, s.at[w]); });
          store_h<F>(out, alpha, s);
        }
    };
    stage_tile(0, begin);
    int tile = 0;
    for (int64_t position = begin; position < span.end; position += at.tile_steps, ++tile) {
      stage_tile(tile + 1, position + at.tile_steps);
      wait_for_copies<1>();
      with_part_and_cell<F>(span, position, at.tile_steps, call, [&]<bool kForgets>(const auto&... given) {
        scan_tile.template operator()<kForgets>(tile, position, given...);
      });
    }
    wait_for_copies<0>();
    if (span.last)
      for (int c = room.thread; c < room.channels && at.first + c < scan.channels; c += room.threads)
        store_states<Single>(scan.final_state, span.sequence, scan.channels, at.first + c, {{room.carried(c)}});
  }
  leave<F>(room, call, at.first, at.job);
}

// Gradients, tile by tile from the right. Wide: whole sequences. Chunked: from the jobs' entry m. The states from those
// that the forward pass saved.
template <class F>
__global__ void __launch_bounds__(kTileThreads<F>, kHeld / kTileThreads<F>)
    backward(const __grid_constant__ Call<typename F::S> call) {
  using S = typename F::S;
  constexpr int kGrad = F::kStreams;  // where grad_h is staged
  // Of the maps the rows are the factor of m, the offset of s, that of m, and the factor of s if it is another.
  constexpr bool kComplex = RealOf<S>::is_complex;
  constexpr int kFactor = kComplex ? 3 : 0;
  using Single = typename F::Single;
  if (is_idle(call)) return;
  const auto& [scan, plan, work, across, surrogate, unless_zero] = call;
  const TilePlace<F> at(call);
  const BackwardRoom<F> room;
  const ChannelInputs<F> channel(scan, at.d);
  const typename F::States alpha = load_alpha<F>(scan, at.d);
  typename F::States sums[F::kSums];
#pragma unroll
  for (int i = 0; i < F::kSums; ++i) {
    sums[i] = all<F>(0);
    room.own(kBackwardMaps<F> + 2 * i) = room.own(kBackwardMaps<F> + 2 * i + 1) = all<F>(0);
  }
  int summed = 0;  // steps added to `sums` since the last add_up

  for (int64_t job = at.job; job < plan.jobs; job += plan.sum_rows) {
    Spans spans(scan, plan, job, -1);
    for (Span span; spans.next(span);) {
      for (int c = room.thread; c < room.channels && at.first + c < scan.channels; c += room.threads)
        room.carried(c) = (span.last ? load_states<Single>(scan.grad_final, span.sequence, scan.channels, at.first + c)
                                     : load_states<Single>(work.entry, job, scan.channels, at.first + c))
                              .at[0];
      const auto stage_tile = [&](int tile, int64_t position) {
        if (position + at.tile_steps > span.begin) {
          if (at.inside)
            with_part<F>(span, position, at.tile_steps, [&](const auto& part) {
              stage_inputs<F>(room, tile, scan, span.row, at.d, part);
              stage<F>(room, kGrad, tile, {scan, scan.grad_h, span.row, at.d}, part);
            });
          for (int c = room.thread; c < room.channels && at.first + c < scan.channels; c += room.threads)
            stage_state(room.start(tile, c), scan, plan, span, position > span.begin ? position : span.begin,
                        at.first + c);
        }
        commit_copies();
      };
      const auto differentiate_tile = [&]<bool kForgets>(int tile, int64_t position, const auto& part,
                                                         const auto& cell) {
        using Elements = Vector<typename F::T, F::W>;
        const auto lambda = [&](S grad, int w, const typename F::States& m) {
          return product_sum(real(alpha.at[w]), grad, m.at[w]);
        };
        typename F::States a = all<F>(1), u = all<F>(0), m = all<F>(0);
        // Before each step and after the last: the states or, where a write forgets, what the thread's own steps wrote.
        typename std::conditional_t<kForgets, typename Writes<F>::Values, typename F::States> states[kSteps<F> + 1];
        if constexpr (kForgets) {
          using V = typename Writes<F>::V;
          typename Writes<F>::Mask written[F::W / kElements<V>] = {};
          states[0] = Writes<F>::none();
#pragma unroll
          for (int t = 0; t < kSteps<F>; ++t) {
            const auto grad = Writes<F>::values(room.staged(tile, kGrad, t));
            for_values<V>(room, tile, t, channel, [&](int i, const V* x) {
              states[t + 1].at[i] = Writes<F>::last(cell, x, states[t].at[i]);
              written[i] = written[i] | cell.writes(x);
              const V held = select(written[i], splat<V>(0), grad.at[i]);  // what reaches the left end of it
#pragma unroll
              for (int j = 0; j < kElements<V>; ++j) {
                const int w = i * kElements<V> + j;
                m.at[w] = lambda(lane(held, j), w, m);
              }
            });
          }
          Writes<F>::as_map(states[kSteps<F>], a, u);
        } else {
#pragma unroll
          for (int t = 0; t < kSteps<F>; ++t)
            if (part.has(t)) {
              const Elements grad = room.staged(tile, kGrad, t);
              for_channels<F>(room, tile, t, channel, [&](int w, const S* x) {
                u.at[w] = cell.redo(x, u.at[w]);
                a.at[w] = cell.pull(x, a.at[w]);
                m.at[w] = product_sum(a.at[w], real(alpha.at[w]) * widen(grad, w), m.at[w]);  // of its left end
              });
            }
        }
        room.own(0) = a, room.own(1) = u, room.own(2) = m;
        if constexpr (kComplex) room.own(kFactor) = conj_all<F>(a);
        __syncthreads();
        for (int i = room.thread; i < 2 * room.channels; i += room.threads) {
          const int groups = int(blockDim.y), c = i < room.channels ? i : i - room.channels;
          if (at.first + c >= scan.channels) continue;
          const Column<F, BackwardRoom<F>> column{room, scan, span, tile, position, c, at.first + c};
          if (i < room.channels) {
            S *const factors = room.row(kFactor) + c, *const values = room.row(1) + c, start = room.start(tile, c);
            if constexpr (kForgets) {  // values are copied
              walk(factors, values, room.channels, groups, start, apply<S>);
            } else {
              walk_or_scan<false>(factors, values, room.channels, groups, start, [&](S s) {
                return column.scan_steps(room.row(1), 1, s, [&](int, int, const S* x, S s) { return cell.redo(x, s); });
              });
            }
          } else {  // from the right
            const int last = c + (groups - 1) * room.channels;
            S& carried = room.carried(c);
            carried = walk_or_scan<kForgets>(
                room.row(0) + last, room.row(2) + last, -room.channels, groups, carried, [&](S m) {
                  const auto of_channel = real(load_alpha<Single>(scan, at.first + c).at[0]);
                  return column.scan_steps(room.row(2), -1, m, [&](int other, int t, const S* x, S m) {
                    return cell.pull(x, product_sum(of_channel, column.element(other, kGrad, t), m));
                  });
                });
          }
        }
        __syncthreads();
        if (!at.inside) return;
        const typename F::States entry = room.own(1);
        m = room.own(2);
        if constexpr (!kForgets) {
          states[0] = entry;
#pragma unroll
          for (int t = 0; t < kSteps<F>; ++t) {
            states[t + 1] = states[t];
            if (part.has(t))
              for_channels<F>(room, tile, t, channel,
                              [&](int w, const S* x) { states[t + 1].at[w] = cell.redo(x, states[t].at[w]); });
          }
        }
        const auto state = [&](int t, int w) {
          if constexpr (!kForgets) return states[t].at[w];
          else return is_nan(Writes<F>::at(states[t], w)) ? entry.at[w] : Writes<F>::at(states[t], w);
        };
        typename F::T* into[F::kStreams];
        int64_t stride[F::kStreams];
        for_streams<F>([&](int i, int k) {
          const Row<typename F::T> row(scan, scan.grad_in[i], span.row, at.d);
          into[k] = row.at(part.position + kSteps<F> - 1), stride[k] = -row.step;
        });
#pragma unroll
        for (int t = kSteps<F> - 1; t >= 0; --t) {
          if (part.has(t)) {
            typename F::States gradients[F::kInputs];
            const Elements grad = room.staged(tile, kGrad, t);
            for_channels<F>(room, tile, t, channel, [&](int w, const S* x) {
              S dx[F::kInputs];
              const S g = widen(grad, w);
              sums[0].at[w] = product_sum(g, state(t + 1, w), sums[0].at[w]);
              m.at[w] = cell.vjp(x, state(t, w), lambda(g, w, m), dx);
              int sum = 1;
#pragma unroll
              for (int i = 0; i < F::kInputs; ++i) {
                if (F::per_channel(i)) sums[sum++].at[w] += dx[i];
                gradients[i].at[w] = dx[i];
              }
            });
            for_streams<F>(
                [&](int i, int k) { store<Traffic::kStream>(into[k], narrow<typename F::T>(gradients[i])); });
          }
          for_streams<F>([&](int, int k) { into[k] = advance(into[k], stride[k]); });
        }
      };
      int64_t position =
          span.begin < span.end ? (span.end - 1) / at.tile_steps * at.tile_steps : span.begin - at.tile_steps;
      stage_tile(0, position);
      for (int tile = 0; position + at.tile_steps > span.begin; position -= at.tile_steps, ++tile) {
        stage_tile(tile + 1, position - at.tile_steps);
        wait_for_copies<1>();
        with_part_and_cell<F>(span, position, at.tile_steps, call, [&]<bool kForgets>(const auto&... given) {
          differentiate_tile.template operator()<kForgets>(tile, position, given...);
        });
        summed += kSteps<F>;
        if (summed == kSummed) add_up<F>(room, sums), summed = 0;
      }
      wait_for_copies<0>();
      if (span.first)
        for (int c = room.thread; c < room.channels && at.first + c < scan.channels; c += room.threads)
          store_states<Single>(scan.grad_initial, span.sequence, scan.channels, at.first + c, {{room.carried(c)}});
    }
    leave<F>(room, call, at.first, job);
  }
  if (plan.sums == 0) return;
  add_up<F>(room, sums);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < F::kSums; ++i) {
    const S *const sum = room.row(kBackwardMaps<F> + 2 * i), *const lost = room.row(kBackwardMaps<F> + 2 * i + 1);
    for (int c = room.thread; c < room.channels && at.first + c < scan.channels; c += room.threads) {
      Sum<S> all;
      for (int group = 0; group < int(blockDim.y); ++group) {
        const int own = group * room.channels + c;
        all.add(Sum<S>{sum[own], lost[own]}.total());
      }
      store_states<Single>(work.sums, at.job * F::kSums + i, scan.channels, at.first + c, {{all.total()}});
    }
  }
}

}  // namespace mru::cuda
