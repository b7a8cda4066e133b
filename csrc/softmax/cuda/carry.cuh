// What happens between the segments of a sequence. `carry` finds the state that enters each, from the left; `carry_adjoint`
// finds what enters each from the right. A warp has a channel of a sequence.
#pragma once
#include "threads.cuh"

namespace mru::softmax::cuda {

constexpr int kCarryChannels = 4;  // of a block
constexpr unsigned kAllLanes = 0xffffffff;

// Goes through `count` maps in turns; each lane has one of a turn. map_of(i) is the i-th, and enters(i, map) is given all maps
// before it as one, with `entry` first.
template <class Map, class MapOf, class Enters>
__device__ __forceinline__ void scan_sequence(int64_t count, const Map& none, Map entry, MapOf map_of, Enters enters) {
  const int lane = int(threadIdx.x);
  for (int64_t turn = 0; turn < count; turn += kWarp) {
    const bool inside = turn + lane < count;
    Map all = none;
    if (inside) all = map_of(turn + lane);
#pragma unroll
    for (int by = 1; by < int(kWarp); by *= 2) {
      const Map before = all.from([&](auto x) { return __shfl_up_sync(kAllLanes, x, by); });
      if (lane >= by) all = before.then(all);
    }
    const Map before = all.from([](auto x) { return __shfl_up_sync(kAllLanes, x, 1); });
    const Map so_far = lane == 0 ? entry : entry.then(before);
    if (inside) enters(turn + lane, so_far);
    entry = entry.then(all.from([](auto x) { return __shfl_sync(kAllLanes, x, int(kWarp) - 1); }));
  }
}

// The sequence and the channel of a thread, and its head.
template <class F>
struct SequenceChannel {
  int64_t sequence, channel, head;

  __device__ __forceinline__ explicit SequenceChannel(const Call<F>& call) {
    const int64_t blocks = (call.scan.channels + kCarryChannels - 1) / kCarryChannels;
    sequence = blockIdx.x / unsigned(blocks);
    channel = (blockIdx.x - sequence * blocks) * kCarryChannels + threadIdx.y;
    head = int64_t(unsigned(channel) / unsigned(call.plan.group));
  }
};

template <class S>
__device__ __forceinline__ S at(const S* p) {
  return load<Traffic::kState, 1>(p).at[0];
}
template <class S>
__device__ __forceinline__ void put(S* p, S x) {
  store<Traffic::kState>(p, Vector<S, 1>{{x}});
}

// The map of a segment at one channel.
template <class S>
struct ChannelMap {
  SegmentMap<S> head;
  S mean;

  // The map of these steps, then of those of `second`.
  __device__ __forceinline__ ChannelMap then(const ChannelMap& second) const {
    ChannelMap both = *this;
    const S k = softmax::then(both.head, second.head);
    both.mean = mix(k, mean, second.mean);
    return both;
  }
  template <class Shuffle>
  __device__ __forceinline__ ChannelMap from(Shuffle shuffle) const {
    return {{shuffle(head.decay), shuffle(head.Z), shuffle(head.z)}, shuffle(mean)};
  }
};
// The map of a row of states, at a channel.
template <class F>
__device__ __forceinline__ ChannelMap<typename F::S> map_of(const Call<F>& call, const SequenceChannel<F>& place,
                                                            const typename F::S* state, typename F::S decay) {
  const typename F::S* const of_head = state + call.scan.channels + place.head;
  return {{decay, at(of_head), at(of_head + call.scan.heads)}, at(state + place.channel)};
}

// The states that enter the segments of a sequence (Plan::second), but for the first.
template <class F>
__global__ void __launch_bounds__(kCarryChannels* int(kWarp)) carry(const __grid_constant__ Call<F> call) {
  using S = typename F::S;
  const HeadScan& scan = call.scan;
  const Plan& plan = call.plan;
  const SequenceChannel<F> place(call);
  if (place.channel >= scan.channels) return;
  const Sequence all(call, place.sequence);
  const ChannelMap<S> none{no_steps<S>(), S(0)};
  ChannelMap<S> entry = none;
  if (scan.initial)
    entry = map_of(call, place, static_cast<const S*>(scan.initial) + place.sequence * plan.columns, S(0));
  scan_sequence(
      all.count, none, entry,
      [&](int64_t i) {
        const S decay = at(call.work(plan.decays) + (all.first + i) * scan.heads + place.head);
        return map_of(call, place, call.work(plan.first) + (all.first + i) * plan.columns, decay);
      },
      [&](int64_t i, const ChannelMap<S>& state) {
        S* const to = call.work(plan.second) + (all.first + i) * plan.columns;
        put(to + place.channel, state.mean);
        if (place.channel != place.head * plan.group) return;
        put(to + scan.channels + place.head, state.head.Z);
        put(to + scan.channels + scan.heads + place.head, state.head.z);
      });
}

// What steps make of the adjoint at their right: dL/dmean becomes f dL/dmean + mean, dL/dZ becomes f dL/dZ + g dL/dmean + Z.
template <class S>
struct AdjointMap {
  S f, g, mean, Z;

  // This map, then that of steps to the left.
  __device__ __forceinline__ AdjointMap then(const AdjointMap& left) const {
    return {left.f * f, left.f * g + left.g * f, left.f * mean + left.mean, left.f * Z + left.g * mean + left.Z};
  }
  template <class Shuffle>
  __device__ __forceinline__ AdjointMap from(Shuffle shuffle) const {
    return {shuffle(f), shuffle(g), shuffle(mean), shuffle(Z)};
  }
};

// From what each segment makes of 0 (Plan::first and second) to what enters it from the right. The last segment's is of the
// final state's gradient already; nothing else enters it.
template <class F>
__global__ void __launch_bounds__(kCarryChannels* int(kWarp)) carry_adjoint(const __grid_constant__ Call<F> call) {
  using S = typename F::S;
  const HeadScan& scan = call.scan;
  const Plan& plan = call.plan;
  const SequenceChannel<F> place(call);
  if (place.channel >= scan.channels) return;
  const Sequence all(call, place.sequence);
  const int64_t last = all.count - 1;
  const auto border = [&](int64_t segment) {  // the state that enters a segment
    const S* const states = static_cast<const S*>(segment == 0 ? scan.initial : scan.checkpoints);
    if (!states) return ChannelMap<S>{no_steps<S>(), S(0)};
    const int64_t row = segment == 0 ? place.sequence : border_row(call, all.row, all.start + segment * plan.steps);
    return map_of(call, place, states + row * plan.columns, S(0));
  };
  const auto of = [&](int64_t array, int64_t segment) {
    return call.work(array) + (all.first + segment) * scan.channels + place.channel;
  };
  const auto own = [&](int64_t array, int64_t segment) {  // not `at`: this launch overwrites it
    return load<Traffic::kSlot, 1>(of(array, segment)).at[0];
  };
  scan_sequence(
      last, AdjointMap<S>{1, 0, 0, 0}, AdjointMap<S>{0, 0, own(plan.first, last), own(plan.second, last)},
      [&](int64_t i) {
        const int64_t segment = last - 1 - i;
        const ChannelMap<S> start = border(segment), end = border(segment + 1);
        const S decay = at(call.work(plan.decays) + (all.first + segment) * scan.heads + place.head);
        const S f = adjoint_factor<S>({start.head.Z, start.head.z}, {end.head.Z, end.head.z}, decay);
        return AdjointMap<S>{f, f * (start.mean - end.mean), own(plan.first, segment), own(plan.second, segment)};
      },
      [&](int64_t i, const AdjointMap<S>& entry) {
        put(of(plan.first, last - 1 - i), entry.mean);
        put(of(plan.second, last - 1 - i), entry.Z);
      });
}

}  // namespace mru::softmax::cuda
