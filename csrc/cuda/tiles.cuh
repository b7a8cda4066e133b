// What `forward` and `backward` have in common. They read the streams and write what is asked for; a block scans a
// segment tile after tile, so that every stream is read once:
//
//   group, lane   y and x of a thread: its kSteps steps of the tile, one after another; its W channels
//   tile          groups x kSteps scan positions of the row, aligned. While the block works on one, it copies the next
//                 to shared memory, where a thread reads only what it copied itself
//   walk          from group to group, over the map that each group makes of its steps: a thread for a channel
//
// Steps outside a span change nothing: their group's map is the identity. If applying maps leaves the range of the
// dtype, the steps are scanned instead: see walk_or_scan.
#pragma once
#include "carry.cuh"
#include "codes.cuh"

namespace mru::cuda {

// Steps of a thread in a tile: as many as its registers and the block's shared memory bear.
template <class F>
constexpr int kSteps = (F::kGivenInputs >= 4 && (F::kSums > 1 || sizeof(typename F::S) == 8)) || F::kWideGates ||
                               sizeof(typename F::S) == 16
                           ? 4
                           : 8;
constexpr int kTile = 64, kLongTile = 128;  // steps of a tile, or nearly
constexpr int64_t kManyBlocks = 512;        // from this number on, blocks of short tiles fill a device
constexpr int kHeld = 256;                  // threads that a multiprocessor has registers for, at least

// Threads side by side: 256 bytes of a row where each moves 16.
template <class F>
constexpr int kRowLanes = kSteps<F> < 8 ? 8 : 16;
template <class F>
constexpr int kTileThreads = kRowLanes<F> * kLongTile / kSteps<F>;  // of a block, at most

// How threads form a block. It depends on sizes, because the order of every sum follows from it, and on the shared
// memory that a block may have.
struct Tiling {
  int lanes, groups;
  int64_t across;  // blocks of a segment

  // Where a row has more than one tile, they begin where states are saved. bytes(lanes, groups) must not exceed `most`.
  template <class Bytes>
  Tiling(const Scan& scan, int64_t segments, int row_lanes, int width, int steps, int64_t most, Bytes bytes)
      : lanes(row_lanes) {
    const auto blocks = [&] { return (scan.channels + lanes * width - 1) / (lanes * width); };
    const auto groups_of = [&](int64_t tile) {
      const int64_t whole = tile / scan.chunk * scan.chunk / steps, all = (scan.time + steps - 1) / steps;
      return int(std::max<int64_t>(scan.time < tile ? all : whole, 1));
    };
    while (lanes > 1 && lanes / 2 * width >= scan.channels) lanes /= 2;
    groups = groups_of(segments * blocks() >= kManyBlocks ? kTile : kLongTile);
    if (bytes(lanes, groups) > most) groups = groups_of(kTile);
    while (bytes(lanes, groups) > most && lanes > 1) lanes /= 2;
    while (lanes * groups < 64) lanes *= 2;
    across = blocks();
  }
};

// Shared memory of a block: kMaps rows of a vector of states a thread; kCarried rows of a state a channel; then, warp
// by warp, what is staged of two tiles, kStaged vectors of elements a step and thread.
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
  // The state or m that the walk carries from tile to tile.
  __device__ __forceinline__ S& carried(int channel) const { return carried_[channel]; }
  // The state on entry to a tile, for a walk that starts from a saved state.
  __device__ __forceinline__ S& start(int tile, int channel) const {
    static_assert(kCarried == 5);
    return carried_[(1 + (tile & 1)) * channels + channel];
  }
  // The sum of m over resets, and what it has lost (sum.h).
  __device__ __forceinline__ S& reset_grad(int channel) const { return carried_[3 * channels + channel]; }
  __device__ __forceinline__ S& reset_grad_lost(int channel) const { return carried_[4 * channels + channel]; }
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

// The steps [low, high) of a thread in a tile that lie in a span. kWhole: all, and for every thread of the block.
template <class F, bool kWhole>
struct Part {
  static constexpr int K = kSteps<F>;
  int tile;                 // number of the tile in the span
  int64_t begin, position;  // of the tile, and of the thread's step 0
  int low, high;

  __device__ __forceinline__ Part(const Span& span, int tile, int64_t begin)
      : tile(tile),
        begin(begin),
        position(begin + int64_t(threadIdx.y) * K),
        low(span.begin > position ? int(span.begin - position < K ? span.begin - position : K) : 0),
        high(span.end <= position ? 0 : (span.end - position < K ? int(span.end - position) : K)) {}
  __device__ __forceinline__ bool has(int t) const { return kWhole || (low <= t && t < high); }
};

// A thread in a block that scans tiles. kStaged, kMaps, kCarried: of its TileRoom.
template <class F, int kStaged, int kMaps, int kCarried>
struct TileAgent {
  using S = typename F::S;
  using T = typename F::T;
  using Cell = typename F::Cell;
  using Single = typename F::Single;
  using Room = TileRoom<F, kStaged, kMaps, kCarried>;

  const Call<F>& call;
  const Room room{};
  int64_t segment, first, d;  // segment; first channel of the block, and of the thread
  bool inside;                // whether the thread has channels
  const int64_t tile_steps = int64_t(blockDim.y) * kSteps<F>;
  const ChannelInputs<F> channel;
  Span span{};

  __device__ __forceinline__ explicit TileAgent(const Call<F>& call)
      : call(call),
        segment(call.across(blockIdx.x)),
        first((int64_t(blockIdx.x) - segment * call.across.divisor()) * blockDim.x * F::W),
        d(first + int64_t(threadIdx.x) * F::W),
        inside(d < call.scan.channels),
        channel(call.scan, inside ? d : 0) {
    if (!inside) d = 0;
  }

  // Calls each(c, d) for the channels of the block that the thread walks over: c in the block, d in the row.
  template <class Each>
  __device__ __forceinline__ void for_block(Each each) const {
    for (int c = room.thread; c < room.channels && first + c < call.scan.channels; c += room.threads)
      each(c, first + c);
  }

  // Calls each(part) for a tile.
  template <class Each>
  __device__ __forceinline__ void with_part(int tile, int64_t begin, Each each) const {
    if (span.begin <= begin && begin + tile_steps <= span.end) each(Part<F, true>(span, tile, begin));
    else each(Part<F, false>(span, tile, begin));
  }
  // Calls each<kOverwrites>(part, cell) for a tile.
  template <class Each>
  __device__ __forceinline__ void with_part_and_cell(int tile, int64_t begin, Each each) const {
    with_part(tile, begin, [&]<bool kWhole>(const Part<F, kWhole>& part) {
      if constexpr (kWhole) {
        with_cell(call, [&]<bool kOverwrites>(const Cell& cell) { each.template operator()<kOverwrites>(part, cell); });
      } else {
        const Cell cell = call.cell;
        each.template operator()<false>(part, cell);
      }
    });
  }

  // Copies a stream's steps, or those of all input streams, to shared memory.
  template <class Part>
  __device__ __forceinline__ void stage(int k, const Row<const T>& stream, const Part& part) const {
    const T* at = stream.at(part.position);
#pragma unroll
    for (int t = 0; t < kSteps<F>; ++t, at = advance(at, stream.step))
      if (part.has(t)) copy_ahead<Traffic::kStream, F::W>(&room.staged(part.tile, k, t), at);
  }
  template <class Part>
  __device__ __forceinline__ void stage_inputs(const Part& part) const {
    for_streams<F>([&](int i, int k) { stage(k, {call.scan, call.scan.in[i].stream, span.row(call.scan), d}, part); });
  }
  // Calls each(i, x) for the thread's channels, in values V: x are the inputs of its step t at the i-th value.
  template <class V, class Each>
  __device__ __forceinline__ void for_values(int tile, int t, Each each) const {
    Tile<F, 1> inputs;
    for_streams<F>([&](int, int k) { inputs.raw[0][k] = read_again(room.staged(tile, k, t)); });
#pragma unroll
    for (int i = 0; i < F::W / kElements<V>; ++i) {
      V x[F::kInputs];
      inputs.inputs(0, i, channel, x);
      each(i, x);
    }
  }
  template <class Each>
  __device__ __forceinline__ void for_channels(int tile, int t, Each each) const {
    for_values<S>(tile, t, each);
  }

  // Stores what leaves the segment, for `check`.
  __device__ __forceinline__ void store_exit(int64_t segment) const {
    if (call.work.exit && call.plan.is_cut())
      for_block([&](int c, int64_t d) {
        store_states<Single>(call.work.exit, segment, call.scan.channels, d, {{room.carried(c)}});
      });
  }
};

// A channel of a tile, scanned step by step by one thread if applying maps leaves the range.
template <class F, class Agent>
struct Column {
  using S = typename F::S;
  const Agent& agent;
  int tile;
  int64_t begin;  // position of the tile
  int channel;    // in the block
  int64_t d;      // in the row

  // values[group, channel] becomes what enters a group, in scan order or (direction -1) from the right. Returns what
  // leaves the last. each(step, x, s): returns what leaves a step of the tile, given its inputs x and what enters it.
  template <class Each>
  __device__ __forceinline__ S scan_steps(S* values, int direction, S s, Each each) const {
    S x[F::kInputs];
    channel_inputs(x);
    const int steps = int(blockDim.y) * kSteps<F>;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int step = direction > 0 ? i : steps - 1 - i;
      if (i % kSteps<F> == 0) values[step / kSteps<F> * agent.room.channels + channel] = s;
      if (!has(step)) continue;
      inputs(step, x);
      s = each(step, x, s);
    }
    return s;
  }
  // The element of the k-th staged stream at a step.
  __device__ __forceinline__ S element(int step, int k) const {
    const int other = step / kSteps<F> * int(blockDim.x) + channel / F::W;
    return widen(agent.room.staged_by(other, tile, k, step % kSteps<F>).at[channel % F::W]);
  }
  // Sets those of x that come per channel, and those that are streams.
  __device__ __forceinline__ void channel_inputs(S* x) const {
    ChannelInputs<typename F::Single>(agent.call.scan, d).at(0, x);
  }
  __device__ __forceinline__ void inputs(int step, S* x) const {
    for_streams<F>([&](int i, int k) { x[i] = element(step, k); });
  }
  __device__ __forceinline__ bool has(int step) const {
    return begin + step >= agent.span.begin && begin + step < agent.span.end;
  }
};

// 0 x + sum: NaN once an x is infinite or NaN.
template <class S>
__device__ __forceinline__ S add_if_not_finite(S x, S sum) {
  if constexpr (RealOf<S>::is_complex) return typename RealOf<S>::type(0) * x + sum;
  else return multiply_add(S(0), x, sum);
}

// `walk` from `carried`. If a value is not finite, calls the slow but exact scan(s) instead. A NaN on entry stays.
// kOverwrites: factors are 0 or 1, and nothing is multiplied by 0.
template <bool kOverwrites, class S, class ScanSteps>
__device__ __forceinline__ S walk_or_scan(const S* factors, S* values, int stride, int count, S carried,
                                          ScanSteps scan) {
  S finite = 0;
  const S left = walk(factors, values, stride, count, carried, [&](Affine<S> map, S s) {
    const S next = kOverwrites ? map.apply(s) : map.apply_finite(s);
    finite = add_if_not_finite(next, finite);
    return next;
  });
  return is_nan(finite) && !is_nan(carried) ? scan(carried) : left;
}

}  // namespace mru::cuda
