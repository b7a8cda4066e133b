// Streams and states in global memory: rows, tiles of steps, tiles that are copied ahead, checkpoints.
//
//   tile   U steps, aligned: their loads are issued together. Steps before and after the tiles of a span are single.
#pragma once
#include "pairs.cuh"
#include "spans.cuh"

namespace mru::cuda {

// ------------------------------------------------------------------------------------------------ states

template <class S>
__device__ __forceinline__ S* state_row(void* base, int64_t row, int64_t channels, int64_t d) {
  return static_cast<S*>(base) + row * channels + d;
}
template <class F, Traffic kKind = Traffic::kState>
__device__ __forceinline__ typename F::States load_states(const void* base, int64_t row, int64_t channels, int64_t d) {
  using S = typename F::S;
  return load<kKind, F::W>(static_cast<const S*>(base) + row * channels + d);
}
template <class F>
__device__ __forceinline__ void store_states(void* base, int64_t row, int64_t channels, int64_t d,
                                             const typename F::States& s) {
  store<Traffic::kState>(state_row<typename F::S>(base, row, channels, d), s);
}
template <class F>
using Lates = Vector<typename RealOf<typename F::S>::type, F::W>;

template <class F>
__device__ __forceinline__ typename F::States add(typename F::States a, const typename F::States& b) {
#pragma unroll
  for (int w = 0; w < F::W; ++w) a.at[w] += b.at[w];
  return a;
}
template <class F>
__device__ __forceinline__ typename F::States conj_all(typename F::States s) {
#pragma unroll
  for (int w = 0; w < F::W; ++w) s.at[w] = conj(s.at[w]);
  return s;
}

// The inputs that come per channel, at channels [d, d + W). An optional one that is not given is 1.
template <class F>
struct ChannelInputs {
  using S = typename F::S;
  typename F::States value[F::kInputs];

  __device__ __forceinline__ ChannelInputs(const Scan& scan, int64_t d) {
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i)
      if (F::is_per_channel(i)) {
        const S* const from = static_cast<const S*>(scan.in[i].channel);
        value[i] = F::is_optional(i) && !from ? all<F>(1) : load<Traffic::kState, F::W>(from + d);
      }
  }
  // Sets those of x, the inputs at channel w of the thread, that come per channel.
  __device__ __forceinline__ void at(int w, S* x) const {
#pragma unroll
    for (int i = 0; i < F::kInputs; ++i)
      if (F::is_per_channel(i)) x[i] = value[i].at[w];
  }
};

// The state before the first step of a span that begins a sequence, or before which the state is reset.
template <class F>
__device__ __forceinline__ typename F::States enter(const Scan& scan, const typename F::Cell& cell, const Span& span,
                                                    int64_t d, const ChannelInputs<F>& channel) {
  const void* const given = span.resets ? scan.reset_state : scan.initial;
  typename F::States s = all<F>(0);
  if (scan.slots) s = load_states<F, Traffic::kSlot>(given, span.state(scan), scan.channels, d);
  else if (given) s = load_states<F>(given, span.sequence, scan.channels, d);
  if (span.begin < span.end)
#pragma unroll
    for (int w = 0; w < F::W; ++w) {
      typename F::S x[F::kInputs];
      channel.at(w, x);
      s.at[w] = cell.enter(x, s.at[w]);
    }
  return s;
}

// The row of `checkpoints` that holds the state before a boundary.
__device__ __forceinline__ int64_t checkpoint_row(const Scan& scan, const Plan& plan, const Span& span,
                                                  int64_t position) {
  return span.row(scan) * scan.checkpoint_rows + plan.chunk_divisor(position) - 1;
}

// Whether the gradient of the state before a position joins m there: at boundaries, the sequence's end aside.
__device__ __forceinline__ bool joins(const Scan& scan, const Plan& plan, const Span& span, int64_t position) {
  return scan.grad_checkpoints && !(span.last && position == span.end) && span.is_boundary(scan, plan, position);
}
// That gradient, a row of `grad_checkpoints`.
template <class F>
__device__ __forceinline__ typename F::States boundary_grad(const Scan& scan, const Plan& plan, const Span& span,
                                                            int64_t position, int64_t d) {
  return load_states<F>(scan.grad_checkpoints, checkpoint_row(scan, plan, span, position), scan.channels, d);
}

// Saves the states before the boundaries of a span, as the scan comes past them. The one at the span's begin is passed
// before a reset, the one at its end by the next span.
template <class F>
struct Checkpoints {
  const Scan& scan;
  const Plan& plan;
  const Span& span;
  const int64_t d;
  int64_t next;  // position of the next one; the span's end if none is saved

  __device__ __forceinline__ Checkpoints(const Scan& scan, const Plan& plan, const Span& span, int64_t d)
      : scan(scan), plan(plan), span(span), d(d), next(span.end) {
    if (!scan.checkpoints) return;
    next = span.chunk_begin(scan, plan, span.begin);
    if (span.first || next < span.begin) next += scan.chunk;
  }
  // The end of the steps from a position on that lead to the next one.
  __device__ __forceinline__ int64_t end() const { return next < span.end ? next : span.end; }
  __device__ __forceinline__ void pass(int64_t position, const typename F::States& s) {
    if (position != next || position == span.end) return;
    store_states<F>(scan.checkpoints, checkpoint_row(scan, plan, span, position), scan.channels, d, s);
    next += scan.chunk;
  }
};

// ------------------------------------------------------------------------------------------------ streams

// A stream along the scan of one row, from channel d on.
template <class T>
struct Row {
  T* data;
  int64_t first, step;  // offset of position 0, and from one position to the next

  __device__ __forceinline__ Row(const Scan& scan, const Stream& stream, int64_t row, int64_t d)
      : data(static_cast<T*>(stream.data)),
        first(row * stream.batch + (scan.reverse ? scan.time - 1 : 0) * stream.time + d),
        step(scan.reverse ? -stream.time : stream.time) {}
  __device__ __forceinline__ T* at(int64_t position) const { return data + (first + position * step); }
};

// Calls each(i, k) for every input i that is a stream, the k-th of them.
template <class F, class Each>
__device__ __forceinline__ void for_streams(Each each) {
  int k = 0;
#pragma unroll
  for (int i = 0; i < F::kInputs; ++i)
    if (F::is_stream(i)) each(i, k++);
}

// Calls each<U>(position) for the aligned tiles in [begin, end), and each<1> for the steps before and after them.
template <int U, class Each>
__device__ __forceinline__ void for_tiles(int64_t begin, int64_t end, Each each) {
  for (int64_t position = begin; position < end;) {
    if (position % U == 0 && position + U <= end) each.template operator()<U>(position), position += U;
    else each.template operator()<1>(position), position += 1;
  }
}
// The same until one returns false; then it returns false.
template <int U, class Each>
__device__ __forceinline__ bool for_tiles_while(int64_t begin, int64_t end, Each each) {
  for (int64_t position = begin; position < end;) {
    const bool is_tile = position % U == 0 && position + U <= end;
    if (!(is_tile ? each.template operator()<U>(position) : each.template operator()<1>(position))) return false;
    position += is_tile ? U : 1;
  }
  return true;
}
template <int U, class Each>
__device__ __forceinline__ void for_tiles_from_right(int64_t begin, int64_t end, Each each) {
  for (int64_t position = end; position > begin;) {
    if (position % U == 0 && position - U >= begin) each.template operator()<U>(position -= U);
    else each.template operator()<1>(position -= 1);
  }
}

// U steps of one stream as they lie in memory, to raw[0], raw[stride], ...
template <class F, int U>
__device__ __forceinline__ void load_steps(const Row<const typename F::T>& stream, int64_t position,
                                           Vector<typename F::T, F::W>* raw, int stride = 1) {
  const typename F::T* at = stream.at(position);
#pragma unroll
  for (int t = 0; t < U; ++t, at = advance(at, stream.step)) raw[t * stride] = load<Traffic::kStream, F::W>(at);
}

// U steps of every stream input.
template <class F, int U>
struct Tile {
  Vector<typename F::T, F::W> raw[U][F::kStreams];

  Tile() = default;
  __device__ __forceinline__ Tile(const Scan& scan, int64_t row, int64_t d, int64_t position) {
    for_streams<F>(
        [&](int i, int k) { load_steps<F, U>({scan, scan.in[i].stream, row, d}, position, &raw[0][k], F::kStreams); });
  }
  // The inputs of step t at channel w of the thread.
  __device__ __forceinline__ void inputs(int t, int w, const ChannelInputs<F>& channel, typename F::S* x) const {
    channel.at(w, x);
    for_streams<F>([&](int i, int k) { x[i] = widen(raw[t][k], w); });
  }
  // The streams of step t at the w-th pair of channels of the thread.
  __device__ __forceinline__ void inputs(int t, int w, const ChannelInputs<F>&, Pair<typename F::T>* x) const {
    for_streams<F>([&](int i, int k) { x[i] = bits_as<Vector<Pair<typename F::T>, F::W / 2>>(raw[t][k]).at[w]; });
  }
};

// The tiles of a span, from the left: each is copied to shared memory while the thread works on the one before it. A
// thread reads only what it copied itself.
template <class F, int U>
class TilesAhead {
 public:
  static constexpr int64_t bytes(int threads) { return int64_t(2 * kStep) * threads * sizeof(Elements); }

  __device__ __forceinline__ TilesAhead(const Scan& scan, int64_t d)
      : scan_(scan), d_(d), slots_(reinterpret_cast<Elements*>(shared_memory()) + threadIdx.x) {}
  __device__ __forceinline__ Tile<F, U> at(const Span& span, int64_t position) {
    if (position != ahead_) copy(span, position);
    const Elements* const slot = slots_ + slot_ * blockDim.x;
    slot_ ^= kStep;
    ahead_ = -1;
    if (position + 2 * U <= span.end) copy(span, ahead_ = position + U);
    else commit_copies();
    wait_for_copies<1>();
    Tile<F, U> tile;
#pragma unroll
    for (int i = 0; i < kStep; ++i) tile.raw[i / F::kStreams][i % F::kStreams] = read_again(slot[i * blockDim.x]);
    return tile;
  }

 private:
  using Elements = Vector<typename F::T, F::W>;
  static constexpr int kStep = U * F::kStreams;  // from one of the two slots to the other

  __device__ __forceinline__ void copy(const Span& span, int64_t position) {
    for_streams<F>([&](int i, int k) {
      const Row<const typename F::T> stream(scan_, scan_.in[i].stream, span.row(scan_), d_);
      const typename F::T* at = stream.at(position);
#pragma unroll
      for (int t = 0; t < U; ++t, at = advance(at, stream.step))
        copy_ahead<Traffic::kPassing, F::W>(slots_ + (slot_ + t * F::kStreams + k) * blockDim.x, at);
    });
    commit_copies();
  }

  const Scan& scan_;
  const int64_t d_;
  Elements* const slots_;
  int slot_ = 0;
  int64_t ahead_ = -1;  // the position of the tile that is on its way
};

}  // namespace mru::cuda
