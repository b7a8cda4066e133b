// Kernels over rows of channels: time is the outer loop and the state is a row in the first-level cache, so that
// every stream is read and written as it lies in memory and the channels of a row are independent lanes.
// Compiled once per instruction set (MRU_ISA) and cell (MRU_CELL); everything but the table is local to this file or
// always inlined, so that no code of one instruction set can be linked into another's.
#include "kernels.h"

#include "../cells/bmru.h"
#include "../cells/cut.h"
#include "../cells/linear.h"
#include "../cells/schmitt.h"
#include "vector.h"

namespace mru {
namespace {

template <class T>
using StateT = typename StateOf<T>::type;
template <class S>
using RealT = typename RealOf<S>::type;

constexpr int64_t kFewChannels = 32;  // see Kernel::with_tile
constexpr int64_t kRowsAhead = 4;     // what to fetch ahead of rows, for which hardware does not fetch enough

template <class S>
constexpr int kLanes = kVectorBytes / sizeof(RealT<S>);

// Calls f(lanes, j) for the vectors that cover channels [0, n) from j on.
template <class S, class F>
MRU_INLINE void for_lanes(int64_t n, F f) {
  int64_t j = 0;
  for (; j + kLanes<S> <= n; j += kLanes<S>) f(Whole<kLanes<S>>{}, j);
  if (j < n) f(Part<kLanes<S>>{int(n - j)}, j);
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
  MRU_INLINE T* ahead(int64_t steps) const { return at + steps * step; }
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
  MRU_INLINE void advance(int64_t steps = 1) {
    for (int i = 0; i < Cell::kInputs; ++i)
      if (!per_channel(i)) row[i].advance(steps);
  }

  // The same in the lanes of a vector.
  template <class L>
  struct Lane {
    const Inputs& in;
    const L lanes;
    const int64_t j;
    Vector<S, L::kLanes> constant[Cell::kInputs];

    MRU_INLINE Lane(const Inputs& in, L lanes, int64_t j) : in(in), lanes(lanes), j(j) {
      for (int i = 0; i < Cell::kInputs; ++i)
        if (per_channel(i)) constant[i] = load(lanes, in.channel[i] + j);
    }
    MRU_INLINE void prefetch(int64_t ahead) const {
      for (int i = 0; i < Cell::kInputs; ++i)
        if (!per_channel(i)) __builtin_prefetch(in.row[i].ahead(ahead) + j, 0, 3);
    }
    // The inputs of the step that is `ahead` of the rows.
    MRU_INLINE void load_at(int64_t ahead, Vector<S, L::kLanes>* x) const {
      for (int i = 0; i < Cell::kInputs; ++i)
        x[i] = per_channel(i) ? constant[i] : load(lanes, in.row[i].ahead(ahead) + j);
    }
  };
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
  using Real = RealT<S>;  // of alpha
  using In = Inputs<Cell, T, kChannels>;

  static Cell cell(const Scan& scan) { return Cell(Real(scan.epsilon)); }

  // Calls f<steps>(), of steps that a group of lanes takes before the next group does. Few channels keep their state in
  // registers over a word of events, while all that lies in the first-level cache; many go row by row, as memory does.
  template <class F>
  static MRU_INLINE void with_tile(int64_t channels, F f) {
    if (channels <= kFewChannels) f.template operator()<kEventsPerWord>();
    else f.template operator()<1>();
  }
  // Steps of a tile that begins where so many are left.
  template <int kTile>
  static MRU_INLINE int64_t tile_of(int64_t left) {
    return left < kTile ? left : kTile;
  }

  using Value = Vector<S, kLanes<S>>;
  using Scale = Vector<Real, kLanes<S>>;

  // What is carried from row to row is kept twice for the last lanes, where these are part of a vector: what a store with
  // a mask wrote, a load does not get before it has left for the cache.
  struct Carried {
    Value part{};

    Carried() = default;
    Carried(const S* row, int64_t n) {
      const int count = n % kLanes<S>;
      if (count > 0) part = load(Part<kLanes<S>>{count}, row + n - count);
    }
    template <class L>
    MRU_INLINE Value get(L lanes, const S* p) const {
      return L::kWhole ? load(lanes, p) : part;
    }
    template <class L>
    MRU_INLINE void put(L lanes, S* p, Value v) {
      store(lanes, p, v);
      if (!L::kWhole) part = v;
    }
  };

  // Magnitudes of the last states of a piece (`recent`, csrc/cells/cut.h). `row`: one per channel; null if not needed.
  struct Late {
    Real* row;

    Late(void* late, int64_t n) : row(static_cast<Real*>(late)) {
      for (int64_t j = 0; row && j < n; ++j) row[j] = 0;
    }
    // Whether a step that `more` steps follow in the piece still counts.
    MRU_INLINE bool wants(int64_t more) const { return row && more < kRecent; }
    template <class L>
    MRU_INLINE Scale get(L lanes, int64_t j) const {
      return load(lanes, row + j);
    }
    template <class L>
    MRU_INLINE void put(L lanes, int64_t j, Scale m) {
      store(lanes, row + j, m);
    }
  };

  // A word of events, one a channel, in lanes as wide as the state's.
  using Word = typename Lanes<Value>::Int;
  using NarrowWord = Vector<int32_t, kLanes<S>>;
  template <class L>
  static MRU_INLINE Word load_word(L lanes, const int32_t* words) {
    return __builtin_convertvector(load_raw<NarrowWord>(lanes, words), Word);
  }
  template <class L>
  static MRU_INLINE void put_word(L lanes, int32_t* words, Word word, Word& part) {
    store_raw(lanes, words, __builtin_convertvector(word, NarrowWord));
    if (!L::kWhole) part = word;
  }
  static int shift(int64_t step) { return step % kEventsPerWord; }

  enum class Events { kNone, kRead, kPack };
  template <Events kEvents>
  static void forward(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* carry) {
    with_tile(d1 - d0, [&]<int kTile>() { forward_by<kTile, kEvents>(scan, piece, d0, d1, carry); });
  }
  template <int kTile, Events kEvents>
  static void forward_by(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* carry) {
    const Cell f = cell(scan);
    const int64_t n = d1 - d0;
    S* const state = static_cast<S*>(carry);
    const Real* const alpha = static_cast<const Real*>(scan.alpha) + d0;
    Carried carried(state, n);
    Word part_word{};  // as Carried::part
    In in(scan, piece, piece.begin, d0);
    Row<T> h(scan, scan.h, piece, piece.begin, d0);
    for (int64_t step = piece.begin; step < piece.end;) {
      const int64_t steps = tile_of<kTile>(piece.end - step);
      int32_t* const words = kEvents == Events::kNone ? nullptr : event_row(scan, piece, step, d0);
      for_lanes<S>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
        const typename In::template Lane<L> inputs(in, lanes, j);
        const Scale scale = load(lanes, alpha + j);
        Value s = carried.get(lanes, state + j);
        Word word{};
        if constexpr (kEvents == Events::kRead) word = load_word(lanes, words + j) >> shift(step);
        if constexpr (kEvents == Events::kPack)
          if (shift(step) != 0) word = L::kWhole ? load_word(lanes, words + j) : part_word;
        for (int64_t i = 0; i < steps; ++i) {
          if constexpr (kEvents == Events::kRead) {
            s = f.step_event(word & kEventMask, s);
            word >>= 1;
          } else {
            Value x[Cell::kInputs];
            inputs.load_at(i, x);
            if constexpr (kTile == 1) inputs.prefetch(kRowsAhead);
            s = f.step(x, s);
            if constexpr (kEvents == Events::kPack) word |= f.encode(x) << shift(step + i);
          }
          if constexpr (kTile == 1) __builtin_prefetch(h.ahead(kRowsAhead) + j, 1, 3);
          store(lanes, h.ahead(i) + j, scale * s);
        }
        carried.put(lanes, state + j, s);
        if constexpr (kEvents == Events::kPack) put_word(lanes, words + j, word, part_word);
      });
      in.advance(steps);
      h.advance(steps);
      step += steps;
      if (scan.checkpoints && step % scan.chunk == 0 && step < piece.length)
        __builtin_memcpy(checkpoint_row<S>(scan, piece, step, d0), state, n * sizeof(S));
    }
  }

  static void summarize(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* factor, void* offset,
                        void* late) {
    with_tile(d1 - d0, [&]<int kTile>() { summarize_by<kTile>(scan, piece, d0, d1, factor, offset, late); });
  }
  template <int kTile>
  static void summarize_by(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* factor, void* offset,
                           void* late) {
    const Cell f = cell(scan);
    const int64_t n = d1 - d0;
    S* const factors = static_cast<S*>(factor);
    S* const offsets = static_cast<S*>(offset);
    for (int64_t j = 0; j < n; ++j) factors[j] = 1, offsets[j] = 0;
    Late recently(late, n);
    Carried carried_a(factors, n), carried_u;
    Word part_word{};  // as Carried::part
    In in(scan, piece, piece.begin, d0);
    for (int64_t step = piece.begin; step < piece.end;) {
      const int64_t steps = tile_of<kTile>(piece.end - step);
      int32_t* const words = scan.events ? event_row(scan, piece, step, d0) : nullptr;
      for_lanes<S>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
        const typename In::template Lane<L> inputs(in, lanes, j);
        Value a = carried_a.get(lanes, factors + j), u = carried_u.get(lanes, offsets + j);
        const bool is_late = recently.wants(piece.end - step - steps);
        Scale m{};
        if (is_late) m = recently.get(lanes, j);
        Word word{};
        if (Cell::kEvents && words && shift(step) != 0) word = L::kWhole ? load_word(lanes, words + j) : part_word;
        for (int64_t i = 0; i < steps; ++i) {
          Value x[Cell::kInputs];
          inputs.load_at(i, x);
          if constexpr (kTile == 1) inputs.prefetch(kRowsAhead);
          u = f.step(x, u);
          a = conj(f.pull(x, conj(a)));
          if (is_late && recently.wants(piece.end - step - i - 1)) m = recent(u, m);
          if constexpr (Cell::kEvents) word |= f.encode(x) << shift(step + i);
        }
        if (is_late) recently.put(lanes, j, m);
        carried_u.put(lanes, offsets + j, u);
        carried_a.put(lanes, factors + j, a);
        if (Cell::kEvents && words) put_word(lanes, words + j, word, part_word);
      });
      in.advance(steps);
      step += steps;
    }
  }

  template <int kTile, bool kFromEvents>
  static void summarize_adjoint_by(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* factor,
                                   void* offset, void* late) {
    const Cell f = cell(scan);
    const int64_t n = d1 - d0;
    S* const factors = static_cast<S*>(factor);
    S* const offsets = static_cast<S*>(offset);
    for (int64_t j = 0; j < n; ++j) factors[j] = 1, offsets[j] = 0;
    Late recently(late, n);
    Carried carried_a(factors, n), carried_m;
    const Real* const alpha = static_cast<const Real*>(scan.alpha) + d0;
    In in(scan, piece, piece.end, d0);
    Row<const T> g(scan, scan.grad_h, piece, piece.end, d0);
    for (int64_t end = piece.end; end > piece.begin;) {
      const int64_t steps = (end - 1) % kTile + 1, step = end - steps;  // piece.begin is a multiple of the tile
      in.advance(-steps);
      g.advance(-steps);
      const int32_t* words = kFromEvents ? event_row(scan, piece, step, d0) : nullptr;
      for_lanes<S>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
        const typename In::template Lane<L> inputs(in, lanes, j);
        const Scale scale = load(lanes, alpha + j);
        Value a = carried_a.get(lanes, factors + j), m = carried_m.get(lanes, offsets + j);
        const bool is_late = recently.wants(step - piece.begin);
        Scale r{};
        if (is_late) r = recently.get(lanes, j);
        Word word{};
        if constexpr (kFromEvents) word = load_word(lanes, words + j);
        for (int64_t i = steps; i-- > 0;) {
          const Value lambda = scale * load(lanes, g.ahead(i) + j) + m;
          if constexpr (kTile == 1) __builtin_prefetch(g.ahead(-kRowsAhead) + j, 0, 3);
          if constexpr (kFromEvents) {
            const Word code = word >> shift(step + i) & kEventMask;
            m = f.pull_event(code, lambda);
            a = f.pull_event(code, a);
          } else {
            Value x[Cell::kInputs];
            inputs.load_at(i, x);
            if constexpr (kTile == 1) inputs.prefetch(-kRowsAhead);
            m = f.pull(x, lambda);
            a = f.pull(x, a);
          }
          if (is_late && recently.wants(step + i - piece.begin)) r = recent(m, r);
        }
        if (is_late) recently.put(lanes, j, r);
        carried_m.put(lanes, offsets + j, m);
        carried_a.put(lanes, factors + j, a);
      });
      end = step;
    }
  }
  static void summarize_adjoint(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* factor,
                                void* offset, void* late) {
    with_tile(d1 - d0, [&]<int kTile>() {
      if constexpr (Cell::kEvents)
        if (scan.events) return summarize_adjoint_by<kTile, true>(scan, piece, d0, d1, factor, offset, late);
      summarize_adjoint_by<kTile, false>(scan, piece, d0, d1, factor, offset, late);
    });
  }

  // Chunk by chunk from the right: recompute the states of the chunk from its saved boundary state, then go left.
  static void backward(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* carry, void* sums,
                       int64_t stride, void* scratch) {
    with_tile(d1 - d0, [&]<int kTile>() { backward_by<kTile>(scan, piece, d0, d1, carry, sums, stride, scratch); });
  }
  template <int kTile>
  static void backward_by(const Scan& scan, const Piece& piece, int64_t d0, int64_t d1, void* carry, void* sums,
                          int64_t stride, void* scratch) {
    const Cell f(Real(scan.epsilon), Surrogate<Real>(scan.surrogate_scale));
    const int64_t n = d1 - d0;
    S* const m = static_cast<S*>(carry);
    const Real* const alpha = static_cast<const Real*>(scan.alpha) + d0;
    S* const states = static_cast<S*>(scratch);  // [chunk + 1, n]: before the first step, after each
    S* const chunk_sums = states + (scan.chunk + 1) * n;
    constexpr int kSums = 1 + Cell::kInputs;
    const int64_t chunk = scan.chunk;  // in locals, as stores might alias what `scan` refers to
    const bool sums_alpha = scan.grad_alpha != nullptr;
    const auto sums_up = [&](int k) { return k == 0 ? sums_alpha : In::per_channel(k - 1); };

    Carried carried_m(m, n);

    const int64_t chunks = (piece.end - piece.begin + scan.chunk - 1) / scan.chunk;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const int64_t begin = piece.begin + c * chunk;
      const int64_t end = begin + chunk < piece.end ? begin + chunk : piece.end;
      const S* entry = nullptr;
      if (begin > 0) entry = checkpoint_row<S>(scan, piece, begin, d0);
      else if (scan.initial) entry = static_cast<const S*>(scan.initial) + piece.sequence * scan.channels + d0;
      for (int64_t j = 0; j < n; ++j) states[j] = entry ? entry[j] : S(0);
      for (int64_t j = 0; j < kSums * n; ++j) chunk_sums[j] = 0;
      Carried carried_s(states, n), carried_sum[kSums];

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
      // What the way back over a step reads and writes: it comes from memory while the chunk on the right computes.
      const auto fetch = [&](int64_t ahead, int64_t j) __attribute__((always_inline)) {
        __builtin_prefetch(g.ahead(ahead) + j, 0, 2);
        for (int k = 0; k < Cell::kInputs; ++k) {
          if (In::per_channel(k)) continue;
          __builtin_prefetch(in.row[k].ahead(ahead) + j, 0, 2);
          __builtin_prefetch(dx_row[k].ahead(ahead) + j, 1, 2);
        }
      };
      for (int64_t step = begin; step < end;) {
        const int64_t steps = tile_of<kTile>(end - step);
        S* const before = states + (step - begin) * n;
        for_lanes<S>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
          const typename In::template Lane<L> inputs(in, lanes, j);
          Value s = carried_s.get(lanes, before + j);
          for (int64_t i = 0; i < steps; ++i) {
            Value x[Cell::kInputs];
            inputs.load_at(i, x);
            if constexpr (kTile == 1) inputs.prefetch(kRowsAhead);
            if (kTile == 1 && c == chunks - 1) fetch(i, j);
            s = f.redo(x, s);
            carried_s.put(lanes, before + (i + 1) * n + j, s);
          }
        });
        advance(steps);
        step += steps;
      }
      for (int64_t right = end; right > begin;) {
        const int64_t steps = (right - 1) % kTile + 1;  // `begin` is a multiple of the tile
        advance(-steps);
        right -= steps;
        const S* const before = states + (right - begin) * n;
        for_lanes<S>(n, [&]<class L>(L lanes, int64_t j) __attribute__((always_inline)) {
          const typename In::template Lane<L> inputs(in, lanes, j);
          const Scale scale = load(lanes, alpha + j);
          Value pulled = carried_m.get(lanes, m + j), sum[kSums] = {};
          for (int k = 0; k < kSums; ++k)
            if (sums_up(k)) sum[k] = carried_sum[k].get(lanes, chunk_sums + k * n + j);
          for (int64_t i = steps; i-- > 0;) {
            Value x[Cell::kInputs], dx[Cell::kInputs];
            inputs.load_at(i, x);
            const Value grad = load(lanes, g.ahead(i) + j);
            pulled = f.vjp(x, load(lanes, before + i * n + j), scale * grad + pulled, dx);
            if (sums_up(0)) sum[0] += grad * load(lanes, before + (i + 1) * n + j);
            for (int k = 0; k < Cell::kInputs; ++k) {
              if (In::per_channel(k)) sum[1 + k] += dx[k];
              else store(lanes, dx_row[k].ahead(i) + j, dx[k]);
            }
            if (c > 0) fetch(i - chunk, j);
          }
          carried_m.put(lanes, m + j, pulled);
          for (int k = 0; k < kSums; ++k)
            if (sums_up(k)) carried_sum[k].put(lanes, chunk_sums + k * n + j, sum[k]);
        });
        if ((right - begin) % kSummed != 0) continue;
        for (int k = 0; k < kSums; ++k) {
          if (!sums_up(k)) continue;
          S* const sum = static_cast<S*>(sums) + k * stride;
          add_up(n, chunk_sums + k * n, sum, sum + kSums * stride);
          carried_sum[k] = {};
        }
      }
    }
  }
  // Adds `partial` [n] to the compensated sums (`sum`, `lost`) and sets it to 0.
  static void add_up(int64_t n, S* partial, S* sum, S* lost) {
    for_lanes<S>(n, [&](auto lanes, int64_t j) {
      Sum<Value> all{load(lanes, sum + j), load(lanes, lost + j)};
      all.add(load(lanes, partial + j));
      store(lanes, sum + j, all.sum);
      store(lanes, lost + j, all.lost);
      store(lanes, partial + j, Value{});
    });
  }

  static void apply(int64_t n, const void* factor, const void* offset, bool forgets, void* state) {
    const S* const a = static_cast<const S*>(factor);
    const S* const u = static_cast<const S*>(offset);
    S* const s = static_cast<S*>(state);
    for (int64_t j = 0; j < n; ++j) s[j] = forgets && a[j] == S(0) ? u[j] : a[j] * s[j] + u[j];
  }

  static bool consistent(int64_t n, bool forgets, const void* factor, const void* offset, const void* late,
                         const void* entry, const void* exit, const void* next) {
    const auto at = [](const void* row, int64_t j) { return static_cast<const S*>(row)[j]; };
    const Real* const lately = static_cast<const Real*>(late);
    bool all = true;
    for (int64_t j = 0; j < n; ++j)
      all &= mru::consistent(at(factor, j), at(offset, j), lately[j], at(entry, j), at(exit, j), at(next, j), forgets);
    return all;
  }

  template <bool kAdjoint>
  static bool beyond(int64_t n, const void* far_factor, const void* far_offset, void* factor, void* offset) {
    const S* const far_a = static_cast<const S*>(far_factor);
    const S* const far_u = static_cast<const S*>(far_offset);
    S* const a = static_cast<S*>(factor);
    S* const u = static_cast<S*>(offset);
    bool holds = false;
    for (int64_t j = 0; j < n; ++j) {
      if (a[j] == S(0)) continue;
      u[j] = kAdjoint ? u[j] + far_u[j] : far_u[j];
      a[j] = u[j] == u[j] ? far_a[j] : S(0);
      holds |= !(a[j] == S(0));
    }
    return holds;
  }

  static bool absorb(int64_t n, const void* earlier, void* state) {
    const S* const from = static_cast<const S*>(earlier);
    S* const s = static_cast<S*>(state);
    bool changed = false;
    for (int64_t j = 0; j < n; ++j) {
      if (from[j] == from[j] || !(s[j] == s[j])) continue;
      s[j] = from[j];
      changed = true;
    }
    return changed;
  }

  static void enter(const Scan& scan, int64_t sequence, bool poison, void* state) {
    const S* const initial = static_cast<const S*>(scan.initial);
    const Real* const alpha = static_cast<const Real*>(scan.alpha);
    S* const s = static_cast<S*>(state);
    for (int64_t j = 0; j < scan.channels; ++j) {
      s[j] = initial ? initial[sequence * scan.channels + j] : S(0);
      if (poison && alpha[j] != alpha[j]) s[j] = alpha[j];
    }
  }

  static void reduce(int64_t rows, int64_t n, int64_t stride, const void* sums, void* total) {
    const int64_t to_lost = (1 + Cell::kInputs) * n;
    for_lanes<S>(n, [&](auto lanes, int64_t j) {
      Sum<Value> all;
      const S* at = static_cast<const S*>(sums) + j;
      for (int64_t r = 0; r < rows; ++r, at += stride)
        all.add(Sum<Value>{load(lanes, at), load(lanes, at + to_lost)}.total());
      store(lanes, static_cast<S*>(total) + j, all.total());
    });
  }

  template <Events kEvents>
  static constexpr auto forward_if_events() {
    if constexpr (Cell::kEvents) return &forward<kEvents>;
    else return nullptr;
  }
  static constexpr Kernels table = {&forward<Events::kNone>,
                                    forward_if_events<Events::kRead>(),
                                    forward_if_events<Events::kPack>(),
                                    &summarize,
                                    &summarize_adjoint,
                                    &backward,
                                    &apply,
                                    &consistent,
                                    Cell::kForgets ? &beyond<false> : nullptr,
                                    Cell::kForgets ? &beyond<true> : nullptr,
                                    &absorb,
                                    &enter,
                                    &reduce};
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

template <unsigned kChannels>
const Kernels& linear(const Scan& scan) {
  switch (scan.dtype) {
    case Dtype::kComplex64: return Kernel<Linear<Complex<float>>, Complex<float>, kChannels>::table;
    case Dtype::kComplex128: return Kernel<Linear<Complex<double>>, Complex<double>, kChannels>::table;
    default: return with_dtype<Linear, kChannels>(scan);
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

template <Isa, CellKind kCell>
const Kernels& kernels(const Scan& scan) {
  if constexpr (kCell == CellKind::kBmru)
    return scan.inputs == 3 ? with_threshold<BmruOfThree>(scan) : with_threshold<BmruOfTwo>(scan);
  else if constexpr (kCell == CellKind::kSchmitt) return with_dtype<Schmitt, 6u>(scan);
  else return scan.in[1].channel ? linear<2u>(scan) : linear<0u>(scan);
}

template const Kernels& kernels<Isa::MRU_ISA, CellKind::MRU_CELL>(const Scan&);

}  // namespace mru
