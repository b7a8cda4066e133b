// What the CUDA kernels are compiled for (the form of a cell) and given (the call, its workspace).
//
//   B batch, T time, D channels     W channels of a thread, side by side: 16 bytes of a stream, or 1
//   row        of a batch; a packed call has one          position  of the scan in a row: 0 is the first step scanned
//   segment    positions that are scanned without the others (plan.h)
//   s, m       state; the gradient of the loss by s' that comes from the step to the right
//   a, u       the map of steps (maps/affine.h): s -> a s + u; of the adjoint: m -> a m + u
#pragma once
#include <bit>

#include "../cell.h"
#include "../maps/affine.h"
#include "memory.cuh"
#include "plan.h"

namespace mru::cuda {

// What a kernel is compiled for. C: the declaration of a cell (cell.h). Bit i of kGiven: input i is given, or is
// optional and per channel. Bit i of kChannels: it is one value per channel instead of a stream.
template <class C, class T_, int W_, unsigned kGiven, unsigned kChannels>
struct Form {
  using T = T_;
  using S = typename C::template State<T>;
  using Cell = typename C::template Cell<S, kGiven>;
  using States = Vector<S, W_>;
  template <int kWidth>
  using With = Form<C, T, kWidth, kGiven, kChannels>;  // a thread has kWidth channels
  using Single = With<1>;

  static constexpr int W = W_, kInputs = C::inputs(), kGivenInputs = std::popcount(kGiven);
  static constexpr int kStreams = std::popcount(kGiven & ~kChannels);
  static constexpr int kSums = std::popcount(kChannels);  // what `backward` sums over time: gradients per channel
  static constexpr unsigned kOptional = C::optional_channels();
  static constexpr __host__ __device__ bool is_stream(int i) { return (kGiven & ~kChannels) >> i & 1; }
  static constexpr __host__ __device__ bool is_per_channel(int i) { return kChannels >> i & 1; }
  static constexpr __host__ __device__ bool is_optional(int i) { return kOptional >> i & 1; }
  // Whether a step of a cell with codes reads input i; an optional input per channel only scales h.
  static constexpr __host__ __device__ bool decides(int i) { return (kGiven & ~kOptional) >> i & 1; }
  static constexpr bool kStreamsDecide = (kChannels & ~kOptional) == 0;
  // Gates of three streams in float64: fewer steps at once, for the registers of a thread and the shared memory of a block.
  static constexpr bool kWideGates = Cell::kGated && kStreams >= 3 && sizeof(S) == 8;
};

// Device memory that the launches of one call share. Arrays [segments, D], but for the sums.
template <class S>
struct Workspace {
  S* factor;
  S* offset;
  typename RealOf<S>::type* late;  // recent magnitude of `offset` (maps/cut.h); null where nothing needs it
  S* entry;                        // s or m where the segment begins (for the adjoint: at its right)
  S* exit;                         // s or m where the segment ends; null where nothing is checked
  int* again;                      // [1]: whether uncut kernels scan the call again; null where nothing is checked
  S* sums;                         // [sum_rows, sums, D]
  uint32_t* reset_bits;            // where states are reset (resets.cuh); null: nowhere
  // [segments, 2, D]: m summed over the resets of a segment in a sequence that began before it; in one that begins in it
  // and ends after it
  S* reset_grad;
  bool overwrites;  // whether every write overwrites the state: factors are 0 or 1
};

// Which segments have a map that ignores the state on entry (Affine::head).
enum class Heads { kBegin, kEnd, kNone };  // those in which a sequence begins; in which one ends; none

// What every kernel over the channels of a cell is given.
template <class F>
struct Call {
  Scan scan;
  Plan plan;
  Workspace<typename F::S> work;
  Divisor across;  // kernels of threads: D / W, the threads of a segment; kernels of tiles: the blocks of a segment
  typename F::Cell cell;
  Heads heads = Heads::kBegin;       // of `summarize`
  const int* unless_zero = nullptr;  // [1], not null: the kernel returns at once if it holds 0
};

template <class F>
__device__ __forceinline__ bool is_idle(const Call<F>& call) {
  return call.unless_zero && load<Traffic::kState, 1>(call.unless_zero).at[0] == 0;
}

// Calls each<kOverwrites>(cell). Where every write overwrites the state, the compiler knows it. The cell is a copy, because the
// compiler keeps its scalars in registers then, and reads those of `call` again at every step.
template <class F, class Each>
__device__ __forceinline__ void with_cell(const Call<F>& call, Each each) {
  const typename F::Cell cell = call.cell;
  if constexpr (F::Cell::kOverwrites)
    if (cell.overwrites()) return each.template operator()<true>(cell.overwriting());
  each.template operator()<false>(cell);
}

template <class F>
__device__ __forceinline__ typename F::States all(typename F::S value) {
  typename F::States s;
#pragma unroll
  for (int w = 0; w < F::W; ++w) s.at[w] = value;
  return s;
}

}  // namespace mru::cuda
