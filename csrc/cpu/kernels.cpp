// Kernels over rows of channels: time is the outer loop and the state is a row in the first-level cache, so that
// every stream is read and written as it lies in memory and the channels of a row are independent lanes.
// Compiled once per instruction set (MRU_ISA); everything but the table is local to this file or always inlined, so
// that no code of one instruction set can be linked into another's.
#include "kernels.h"

#include "../cells/bmru.h"
#include "../cells/schmitt.h"
#include "vector.h"

namespace mru {
namespace {

template <class T>
using StateT = typename StateOf<T>::type;

template <class S>
constexpr int kLanes = kVectorBytes / sizeof(S);

// Calls f<N>(j) for lanes [j, j + N) that cover [0, n): whole vectors, then single channels.
template <class S, class F>
MRU_INLINE void for_lanes(int64_t n, F f) {
  int64_t j = 0;
  for (; j + kLanes<S> <= n; j += kLanes<S>) f.template operator()<kLanes<S>>(j);
  for (; j < n; ++j) f.template operator()<1>(j);
}

// A row of a stream that moves along the scan.
template <class T>
struct Row {
  T* at = nullptr;
  int64_t step = 0;

  Row() = default;
  Row(const Scan& scan, const Stream& stream, const Piece& piece, int64_t position, int64_t d0) {
    const int64_t scanned = piece.start + position;
    const int64_t t = scan.reverse ? scan.time - 1 - scanned : scanned;
    at = static_cast<T*>(stream.data) + piece.batch * stream.batch + t * stream.time + d0;
    step = scan.reverse ? -stream.time : stream.time;
  }
  MRU_INLINE void advance(int64_t steps = 1) { at += steps * step; }
};

// The inputs of a cell. Bit i of kChannels: input i is one value per channel instead of a stream.
template <class Cell, class T, unsigned kChannels>
struct Inputs {
  using S = StateT<T>;
  Row<const T> row[Cell::kInputs];
  const S* channel[Cell::kInputs];

  static constexpr bool per_channel(int i) { return kChannels >> i & 1; }

  Inputs(const Scan& scan, const Piece& piece, int64_t position, int64_t d0) {
    for (int i = 0; i < Cell::kInputs; ++i) {
      if (per_channel(i)) channel[i] = static_cast<const S*>(scan.in[i].channel) + d0;
      else row[i] = Row<const T>(scan, scan.in[i].stream, piece, position, d0);
    }
  }
  template <int N>
  MRU_INLINE void load_at(int64_t j, Vector<S, N>* x) const {
    for (int i = 0; i < Cell::kInputs; ++i) x[i] = per_channel(i) ? load<N>(channel[i] + j) : load<N>(row[i].at + j);
  }
  MRU_INLINE void advance(int64_t steps = 1) {
    for (int i = 0; i < Cell::kInputs; ++i)
      if (!per_channel(i)) row[i].advance(steps);
  }
};

int32_t* event_row(const Scan& scan, const Piece& piece, int64_t step, int64_t d0) {
  const int64_t row = piece.batch * scan.event_rows + piece.word + step / kEventsPerWord;
  return scan.events + row * scan.channels + d0;
}

// The saved state that enters `step` > 0, a multiple of the chunk.
template <class S>
S* checkpoint_row(const Scan& scan, const Piece& piece, int64_t step, int64_t d0) {
  const int64_t row = piece.batch * scan.checkpoint_rows + (piece.start + step) / scan.chunk - 1;
  return static_cast<S*>(scan.checkpoints) + row * scan.channels + d0;
}

template <class Cell, class T, unsigned kChannels>
struct Kernel {
  using S = StateT<T>;
  using In = Inputs<Cell, T, kChannels>;

  static Cell cell(const Scan& scan) { return Cell(S(scan.epsilon), S(scan.surrogate_scale)); }

  // Event codes of 16 steps, one word a channel, from the lane's low bits up.
  template <int N>
  static MRU_INLINE auto event(const int32_t* words, int64_t j, int64_t step) {
    const int shift = 2 * (step % kEventsPerWord);
    if constexpr (N == 1) return words[j] >> shift & 3;
    else if constexpr (sizeof(S) == 4) return load_bytes<Vector<int32_t, N>>(words + j) >> shift & 3;
    else return __builtin_convertvector(load_bytes<Vector<int32_t, N>>(words + j), Vector<int64_t, N>) >> shift & 3;
  }
  template <int N, class Int>
  static MRU_INLINE void put_event(int32_t* words, int64_t j, int64_t step, Int code) {
    const int shift = 2 * (step % kEventsPerWord);
    Vector<int32_t, N> narrow;
    if constexpr (sizeof(Int) == sizeof(narrow)) narrow = code;
    else narrow = __builtin_convertvector(code, Vector<int32_t, N>);
    if (shift != 0) narrow = load_bytes<Vector<int32_t, N>>(words + j) | narrow << shift;
    __builtin_memcpy(words + j, &narrow, sizeof narrow);
  }

  template <bool kFromEvents>
  static void forward(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* carry) {
    const Cell f = cell(scan);
    const int64_t n = d1 - d0;
    S* const state = static_cast<S*>(carry);
    const S* const alpha = static_cast<const S*>(scan.alpha) + d0;
    In in(scan, piece, piece.begin, d0);
    Row<T> h(scan, scan.h, piece, piece.begin, d0);
    for (int64_t step = piece.begin; step < piece.end; ++step) {
      const int32_t* words = kFromEvents ? event_row(scan, piece, step, d0) : nullptr;
      for_lanes<S>(n, [&]<int N>(int64_t j) __attribute__((always_inline)) {
        Vector<S, N> s = load<N>(state + j);
        if constexpr (kFromEvents) {
          s = f.step_event(event<N>(words, j, step), s);
        } else {
          Vector<S, N> x[Cell::kInputs];
          in.template load_at<N>(j, x);
          s = f.step(x, s);
        }
        store<N>(state + j, s);
        store<N>(h.at + j, load<N>(alpha + j) * s);
      });
      in.advance();
      h.advance();
      const int64_t next = step + 1;
      if (scan.checkpoints && next % scan.chunk == 0 && next < piece.length)
        __builtin_memcpy(checkpoint_row<S>(scan, piece, next, d0), state, n * sizeof(S));
    }
  }

  static void summarize(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* factor, void* offset) {
    const Cell f = cell(scan);
    const int64_t n = d1 - d0;
    S* const a = static_cast<S*>(factor);
    S* const u = static_cast<S*>(offset);
    for (int64_t j = 0; j < n; ++j) a[j] = 1, u[j] = 0;
    In in(scan, piece, piece.begin, d0);
    for (int64_t step = piece.begin; step < piece.end; ++step) {
      int32_t* const words = scan.events ? event_row(scan, piece, step, d0) : nullptr;
      for_lanes<S>(n, [&]<int N>(int64_t j) __attribute__((always_inline)) {
        Vector<S, N> x[Cell::kInputs];
        in.template load_at<N>(j, x);
        store<N>(u + j, f.step(x, load<N>(u + j)));
        store<N>(a + j, f.pull(x, load<N>(a + j)));
        if constexpr (Cell::kEvents)
          if (words) put_event<N>(words, j, step, f.encode(x));
      });
      in.advance();
    }
  }

  template <bool kFromEvents>
  static void summarize_adjoint_from(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* factor,
                                     void* offset) {
    const Cell f = cell(scan);
    const int64_t n = d1 - d0;
    S* const a = static_cast<S*>(factor);
    S* const m = static_cast<S*>(offset);
    for (int64_t j = 0; j < n; ++j) a[j] = 1, m[j] = 0;
    const S* const alpha = static_cast<const S*>(scan.alpha) + d0;
    In in(scan, piece, piece.end - 1, d0);
    Row<const T> g(scan, scan.grad_h, piece, piece.end - 1, d0);
    for (int64_t step = piece.end - 1; step >= piece.begin; --step) {
      const int32_t* words = kFromEvents ? event_row(scan, piece, step, d0) : nullptr;
      for_lanes<S>(n, [&]<int N>(int64_t j) __attribute__((always_inline)) {
        const Vector<S, N> lambda = load<N>(alpha + j) * load<N>(g.at + j) + load<N>(m + j);
        if constexpr (kFromEvents) {
          const auto code = event<N>(words, j, step);
          store<N>(m + j, f.pull_event(code, lambda));
          store<N>(a + j, f.pull_event(code, load<N>(a + j)));
        } else {
          Vector<S, N> x[Cell::kInputs];
          in.template load_at<N>(j, x);
          store<N>(m + j, f.pull(x, lambda));
          store<N>(a + j, f.pull(x, load<N>(a + j)));
        }
      });
      in.advance(-1);
      g.advance(-1);
    }
  }
  static void summarize_adjoint(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* factor,
                                void* offset) {
    if constexpr (Cell::kEvents)
      if (scan.events) return summarize_adjoint_from<true>(scan, piece, d0, d1, factor, offset);
    summarize_adjoint_from<false>(scan, piece, d0, d1, factor, offset);
  }

  // Chunk by chunk from the right: recompute the states of the chunk from its saved boundary state, then go left.
  static void backward(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* carry, void* sums,
                       int64_t stride, void* scratch) {
    const Cell f = cell(scan);
    const int64_t n = d1 - d0;
    S* const m = static_cast<S*>(carry);
    const S* const alpha = static_cast<const S*>(scan.alpha) + d0;
    S* const states = static_cast<S*>(scratch);  // [chunk + 1, n]: before the first step, after each
    S* const chunk_sums = states + (scan.chunk + 1) * n;
    constexpr int kSums = 1 + Cell::kInputs;

    const int64_t chunks = (piece.end - piece.begin + scan.chunk - 1) / scan.chunk;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const int64_t begin = piece.begin + c * scan.chunk;
      const int64_t end = begin + scan.chunk < piece.end ? begin + scan.chunk : piece.end;
      const S* entry = nullptr;
      if (begin > 0) entry = checkpoint_row<S>(scan, piece, begin, d0);
      else if (scan.initial) entry = static_cast<const S*>(scan.initial) + piece.sequence * scan.channels + d0;
      for (int64_t j = 0; j < n; ++j) states[j] = entry ? entry[j] : S(0);
      for (int64_t j = 0; j < kSums * n; ++j) chunk_sums[j] = 0;

      In in(scan, piece, begin, d0);
      Row<const T> g(scan, scan.grad_h, piece, begin, d0);
      Row<T> dx_row[Cell::kInputs];
      for (int i = 0; i < Cell::kInputs; ++i)
        if (!In::per_channel(i)) dx_row[i] = Row<T>(scan, scan.grad_in[i], piece, begin, d0);
      const auto advance = [&](int64_t steps) __attribute__((always_inline)) {
        in.advance(steps);
        g.advance(steps);
        for (int i = 0; i < Cell::kInputs; ++i)
          if (!In::per_channel(i)) dx_row[i].advance(steps);
      };
      for (int64_t step = begin; step < end; ++step) {
        S* const s = states + (step - begin) * n;
        for_lanes<S>(n, [&]<int N>(int64_t j) __attribute__((always_inline)) {
          Vector<S, N> x[Cell::kInputs];
          in.template load_at<N>(j, x);
          store<N>(s + n + j, f.step(x, load<N>(s + j)));
          // The way back runs against the order that the hardware prefetches in.
          __builtin_prefetch(g.at + j);
          for (int i = 0; i < Cell::kInputs; ++i)
            if (!In::per_channel(i)) __builtin_prefetch(dx_row[i].at + j, 1);
        });
        advance(1);
      }
      for (int64_t step = end - 1; step >= begin; --step) {
        advance(-1);
        const S* const s = states + (step - begin) * n;
        for_lanes<S>(n, [&]<int N>(int64_t j) __attribute__((always_inline)) {
          Vector<S, N> x[Cell::kInputs], dx[Cell::kInputs];
          in.template load_at<N>(j, x);
          const Vector<S, N> grad = load<N>(g.at + j);
          const Vector<S, N> lambda = load<N>(alpha + j) * grad + load<N>(m + j);
          store<N>(m + j, f.vjp(x, load<N>(s + j), lambda, dx));
          if (scan.grad_alpha) store<N>(chunk_sums + j, load<N>(chunk_sums + j) + grad * load<N>(s + n + j));
          for (int i = 0; i < Cell::kInputs; ++i) {
            S* const sum = chunk_sums + (1 + i) * n + j;
            if (In::per_channel(i)) store<N>(sum, load<N>(sum) + dx[i]);
            else store<N>(dx_row[i].at + j, dx[i]);
          }
        });
      }
      for (int i = 0; i < kSums; ++i) {
        S* const total = static_cast<S*>(sums) + i * stride;
        for (int64_t j = 0; j < n; ++j) total[j] += chunk_sums[i * n + j];
      }
    }
  }

  static void apply(int64_t n, const void* factor, const void* offset, bool absorb_nan, void* state) {
    const S* const a = static_cast<const S*>(factor);
    const S* const u = static_cast<const S*>(offset);
    S* const s = static_cast<S*>(state);
    for (int64_t j = 0; j < n; ++j) {
      if (absorb_nan && s[j] != s[j]) continue;
      s[j] = a[j] == S(0) ? u[j] : a[j] * s[j] + u[j];
    }
  }

  static void enter(const Scan& scan, int64_t sequence, bool poison, void* state) {
    const S* const initial = static_cast<const S*>(scan.initial);
    const S* const alpha = static_cast<const S*>(scan.alpha);
    S* const s = static_cast<S*>(state);
    for (int64_t j = 0; j < scan.channels; ++j) {
      s[j] = initial ? initial[sequence * scan.channels + j] : S(0);
      if (poison && alpha[j] != alpha[j]) s[j] = alpha[j];
    }
  }

  static void reduce(int64_t rows, int64_t n, int64_t stride, const void* sums, void* total) {
    S* const out = static_cast<S*>(total);
    for (int64_t j = 0; j < n; ++j) out[j] = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < n; ++j) out[j] += static_cast<const S*>(sums)[r * stride + j];
  }

  static constexpr auto forward_events() {
    if constexpr (Cell::kEvents) return &forward<true>;
    else return nullptr;
  }
  static constexpr Kernels table = {&forward<false>, forward_events(), &summarize, &summarize_adjoint,
                                    &backward,       &apply,           &enter,     &reduce};
};

template <template <class> class Cell, unsigned kChannels>
const Kernels& with_dtype(const Scan& scan) {
  switch (scan.dtype) {
    case Dtype::kFloat64: return Kernel<Cell<double>, double, kChannels>::table;
    case Dtype::kBFloat16: return Kernel<Cell<float>, BFloat16, kChannels>::table;
    case Dtype::kFloat16: return Kernel<Cell<float>, Float16, kChannels>::table;
    default: return Kernel<Cell<float>, float, kChannels>::table;
  }
}

template <template <class> class Cell>
const Kernels& with_threshold(const Scan& scan) {
  return scan.in[1].channel ? with_dtype<Cell, 2u>(scan) : with_dtype<Cell, 0u>(scan);
}
template <class S>
using BmruOfTwo = Bmru<S, false>;
template <class S>
using BmruOfThree = Bmru<S, true>;

}  // namespace

#define MRU_CONCAT(a, b) a##b
#define MRU_TABLE(isa) MRU_CONCAT(kernels_, isa)

const Kernels& MRU_TABLE(MRU_ISA)(const Scan& scan) {
  switch (scan.cell) {
    case CellKind::kBmru: return scan.inputs == 3 ? with_threshold<BmruOfThree>(scan) : with_threshold<BmruOfTwo>(scan);
    case CellKind::kSchmitt: return with_dtype<Schmitt, 6u>(scan);
  }
  __builtin_unreachable();
}

}  // namespace mru
