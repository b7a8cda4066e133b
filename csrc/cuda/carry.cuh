// What happens between the segments: `carry` finds the entry state of each, `check` compares it with what the segment
// before it left, `compose` makes one map of a row. Also `reduce`, which adds up the rows of sums over time, and
// `reduce_taken`, which adds up the sums of m over the resets of a sequence.
#pragma once
#include "../maps/affine.h"
#include "../maps/cut.h"
#include "../sum.h"
#include "spans.cuh"

namespace mru::cuda {

constexpr int kCarryLanes = 4, kCarryGroups = 128;  // threads of a block: channels, runs of segments at once
template <class S>
constexpr int kCarryRun = 64 / sizeof(S);  // segments of a run, at most
constexpr int kCarryPart = 8;              // runs of a part; parts are walked over at the same time
constexpr int kLanes = 32, kGroups = 32;   // threads of a block of `reduce`: channels, rows at once
constexpr int kCheckThreads = 256, kComposeThreads = 128;

// From one map to the next, `stride` apart: each value, the offset of the map, becomes what enters it. Returns what
// leaves the last. apply(map, s): the state after the map.
template <class S, class Apply>
__device__ __forceinline__ S walk(const S* factors, S* values, int stride, int count, S carried, Apply apply) {
  constexpr int kAhead = sizeof(S) > 8 ? 2 : 4;
  for (int i = 0; i < count; i += kAhead) {
    Affine<S> map[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j < count) map[j] = {factors[(i + j) * stride], values[(i + j) * stride]};
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j < count) {
        values[(i + j) * stride] = carried;
        carried = apply(map[j], carried);
      }
  }
  return carried;
}
// The same with Affine::apply.
template <class S>
__device__ __forceinline__ S walk(const S* factors, S* values, int stride, int count, S carried) {
  return walk(factors, values, stride, count, carried, [](Affine<S> map, S s) { return map.apply(s); });
}

// The maps of a run of segments at one channel, in the registers of a thread.
template <class S>
struct Run {
  Affine<S> map[kCarryRun<S>];
  int count;

  // factor, offset: of the run's first segment; the next one is `step` further.
  __device__ __forceinline__ Run(const S* factor, const S* offset, int64_t step, int count) : count(count) {
#pragma unroll
    for (int j = 0; j < kCarryRun<S>; ++j) {
      if (j < count) map[j] = {load<Traffic::kState, 1>(factor).at[0], load<Traffic::kState, 1>(offset).at[0]};
      factor = advance(factor, step), offset = advance(offset, step);
    }
  }
  __device__ __forceinline__ Affine<S> composed() const {
    Affine<S> all = Affine<S>::identity();
#pragma unroll
    for (int j = 0; j < kCarryRun<S>; ++j)
      if (j < count) all = all.then(map[j]);
    return all;
  }
  // Stores the state that enters each segment; s enters the first.
  __device__ __forceinline__ void store_entries(S* entry, int64_t step, S s) const {
#pragma unroll
    for (int j = 0; j < kCarryRun<S>; ++j, entry = advance(entry, step))
      if (j < count) {
        store<Traffic::kState>(entry, Vector<S, 1>{{s}});
        s = map[j].apply(s);
      }
  }
};

// The entry state of every segment of a row, from the left; for the adjoint (direction -1) m from the right. A block
// takes kCarryLanes channels of a row and goes through its segments in turns. Each group of its threads composes a run
// of segments, and some groups compose a part of the runs each. Walks over the parts, and then over the runs of each
// part, give what enters a run. The order depends on sizes only.
template <class S>
__global__ void __launch_bounds__(kCarryLanes* kCarryGroups, 1)
    carry(Workspace<S> work, int64_t row_segments, int run, int64_t channels, int direction) {
  const int group = int(threadIdx.y), groups = int(blockDim.y), parts = (groups + kCarryPart - 1) / kCarryPart;
  S* const factors = reinterpret_cast<S*>(shared_memory()) + threadIdx.x;  // [groups, kCarryLanes], of runs
  S* const offsets = factors + groups * kCarryLanes;
  S* const part_factors = offsets + groups * kCarryLanes;  // [parts, kCarryLanes]
  S* const part_offsets = part_factors + parts * kCarryLanes;
  const unsigned blocks = unsigned((channels + kCarryLanes - 1) / kCarryLanes);
  const int64_t row = blockIdx.x / blocks, d = int64_t(blockIdx.x % blocks) * kCarryLanes + threadIdx.x;
  const int own = group * kCarryLanes;
  const int first = own * kCarryPart, after = groups - group * kCarryPart;
  const int of_part = after < kCarryPart ? after : kCarryPart;  // runs of the group's part, if it has one
  const int64_t step = direction * channels;
  if (work.again && blockIdx.x == 0 && threadIdx.x == 0 && group == 0)
    store<Traffic::kState>(work.again, Vector<int, 1>{{0}});
  S left = 0;  // of the first group's threads: what the segments before a turn leave
  for (int64_t turn = 0; turn < row_segments; turn += int64_t(groups) * run) {
    const int64_t begin = turn + int64_t(group) * run;
    const int64_t more = d < channels ? row_segments - begin : 0;
    const int count = int(more < run ? (more > 0 ? more : 0) : run);
    const int64_t at = (row * row_segments + (direction > 0 ? begin : row_segments - 1 - begin)) * channels + d;
    const Run<S> segments(work.factor + at, work.offset + at, step, count);
    const Affine<S> of_run = segments.composed();
    factors[own] = of_run.a;
    offsets[own] = of_run.b;
    __syncthreads();
    if (group < parts) {
      Affine<S> all = Affine<S>::identity();
      for (int i = 0; i < of_part; ++i) {
        const int at = first + i * kCarryLanes;
        all = all.then({factors[at], offsets[at]});
      }
      part_factors[own] = all.a;
      part_offsets[own] = all.b;
    }
    __syncthreads();
    if (group == 0) left = walk(part_factors, part_offsets, kCarryLanes, parts, left);
    __syncthreads();
    if (group < parts) walk(factors + first, offsets + first, kCarryLanes, of_part, part_offsets[own]);
    __syncthreads();
    segments.store_entries(work.entry + at, step, offsets[own]);
  }
}

// Whether every segment left what was handed to the next one. A thread for a segment and a channel; across: D.
template <class S>
__global__ void __launch_bounds__(kCheckThreads) check(Workspace<S> work, Plan plan, Divisor across, int direction) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, segment = across(thread);
  if (segment >= plan.segments) return;
  const int64_t next = plan.in_row(segment) + direction;
  if (next < 0 || next >= plan.row_segments) return;
  const auto at = [&](const S* states, int64_t i) { return load<Traffic::kState, 1>(states + i).at[0]; };
  const Affine<S> map{at(work.factor, thread), at(work.offset, thread)};
  const auto late = work.late ? load<Traffic::kState, 1>(work.late + thread).at[0] : 0;
  const S next_entry = at(work.entry, thread + direction * across.divisor());
  // The offset of a head is a state that was scanned.
  if (!consistent(map.a, map.b, late, at(work.entry, thread), at(work.exit, thread), next_entry,
                  work.overwrites || map.is_head()))
    store<Traffic::kState>(work.again, Vector<int, 1>{{1}});
}

// The maps of the segments of each row as one: factor, offset [B, D]. A thread for a row and a channel; across: D. The
// factor of a row with a reset, which makes a segment a head, is 0.
template <class S>
__global__ void __launch_bounds__(kComposeThreads)
    compose(Workspace<S> work, int64_t rows, int64_t row_segments, Divisor across, S* factor, S* offset) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = across(thread);
  if (row >= rows) return;
  const int64_t channels = across.divisor(), first = row * (row_segments - 1) * channels + thread;
  const S *next_factor = work.factor + first, *next_offset = work.offset + first;
  Affine<S> all = Affine<S>::identity();
  bool resets = false;
  for (int64_t i = 0; i < row_segments; ++i) {
    const Affine<S> map{load<Traffic::kState, 1>(next_factor).at[0], load<Traffic::kState, 1>(next_offset).at[0]};
    resets = resets || (work.reset_bits && map.is_head());
    all = all.then(map);
    next_factor = advance(next_factor, channels), next_offset = advance(next_offset, channels);
  }
  store<Traffic::kState>(factor + thread, Vector<S, 1>{{resets ? S(0) : all.a}});
  store<Traffic::kState>(offset + thread, Vector<S, 1>{{all.b}});
}

// total[d] = the sum over rows of work.sums[row, which, d], always in the same order. Rows are those of the uncut form
// if it has scanned again.
template <class S>
__global__ void __launch_bounds__(kLanes* kGroups)
    reduce(Workspace<S> work, int64_t rows, int64_t uncut_rows, int count, int which, int64_t channels, S* total) {
  const S* const sums = work.sums;
  if (work.again && load<Traffic::kState, 1>(work.again).at[0] != 0) rows = uncut_rows;
  S* const partial = reinterpret_cast<S*>(shared_memory());  // [kGroups, kLanes]
  const int64_t d = int64_t(blockIdx.x) * kLanes + threadIdx.x;
  Sum<S> sum;
  if (d < channels)
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kGroups)
      sum.add(load<Traffic::kState, 1>(sums + (row * count + which) * channels + d).at[0]);
  partial[threadIdx.y * kLanes + threadIdx.x] = sum.total();
  __syncthreads();
  if (threadIdx.y != 0 || d >= channels) return;
  for (int g = 1; g < kGroups; ++g) sum.add(partial[g * kLanes + threadIdx.x]);
  store<Traffic::kState>(total + d, Vector<S, 1>{{sum.total()}});
}

// grad_reset_state of the sequences that lie in several segments, always in the same order. The others, and all if the
// uncut form has scanned again, are stored already. A thread for a sequence and a channel; across: D.
template <class S>
__global__ void __launch_bounds__(kComposeThreads)
    reduce_taken(Workspace<S> work, const __grid_constant__ Scan scan, const __grid_constant__ Plan plan,
                 Divisor across, Divisor segment_steps) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, n = across(thread);
  if (n >= scan.sequences || load<Traffic::kState, 1>(work.again).at[0] != 0) return;
  int64_t begin = 0, end = scan.time;
  if (scan.offsets) bounds(scan, n, begin, end);
  if (begin == end) return;
  const int64_t row = scan.offsets ? 0 : n * plan.row_segments, d = thread - n * scan.channels;
  const int64_t first = row + segment_steps(begin), last = row + segment_steps(end - 1);
  if (first == last) return;
  Sum<S> sum;
  for (int64_t segment = first; segment <= last; ++segment)
    sum.add(load<Traffic::kState, 1>(work.reset_grad + (2 * segment + (segment == first)) * scan.channels + d).at[0]);
  store<Traffic::kState>(static_cast<S*>(scan.grad_reset_state) + thread, Vector<S, 1>{{sum.total()}});
}

}  // namespace mru::cuda
