// The kernels. Compiled once per instruction set (MRU_ISA): everything is local to this file or always inlined, so that no
// code of one instruction set can be linked into another's.
#include "kernels.h"

#include "../../sum.h"
#include "functions.h"

namespace mru::softmax {
namespace {

enum class Decay { kNone, kHead, kStream };

template <class Element, Decay kDecayKind, bool kHasBonus>
struct Form {
  using T = Element;
  using S = typename StateOf<T>::type;
  static constexpr int kLanes = kVectorBytes / sizeof(S);
  using V = Vector<S, kLanes>;
  static constexpr Decay kKind = kDecayKind;
  static constexpr bool kDecay = kDecayKind != Decay::kNone, kBonus = kHasBonus;
  using WithoutBonus = Form<Element, kDecayKind, false>;
};

// Calls f(lanes, j) for the vectors that cover [0, n) from j on.
template <class F, class Each>
MRU_INLINE void for_lanes(int64_t n, Each each) {
  int64_t j = 0;
  for (; j + F::kLanes <= n; j += F::kLanes) each(Full<F::kLanes>{}, j);
  if (j < n) each(Partial<F::kLanes>{int(n - j)}, j);
}

// The rows of a stream in the order of the scan, from one channel on.
template <class T>
struct Steps {
  T* first = nullptr;
  int64_t by = 0;

  Steps(const HeadScan& scan, const Stream& stream, const Segment& segment, int64_t channel) {
    if (!stream.data) return;
    const int64_t at = scan.reverse ? scan.time - 1 - segment.start : segment.start;
    first = static_cast<T*>(stream.data) + segment.batch * stream.batch + at * stream.time + channel;
    by = scan.reverse ? -stream.time : stream.time;
  }
  T* row(int64_t step) const { return first + step * by; }
};

template <class T>
MRU_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 3);
}

// The inputs of the heads [h0, h1) and of their channels.
template <class F>
struct Inputs {
  using T = typename F::T;
  using S = typename F::S;
  using V = typename F::V;
  int64_t heads, group, channels;  // of this block; `group` channels a head
  Steps<const T> scores, values, decays;
  const S *decay, *bonus;

  Inputs(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1)
      : heads(h1 - h0),
        group(scan.channels / scan.heads),
        channels(heads * group),
        scores(scan, scan.in[kScore].stream, segment, h0),
        values(scan, scan.in[kValue].stream, segment, h0 * group),
        decays(scan, scan.in[kDecay].stream, segment, h0),
        decay(F::kKind == Decay::kHead ? static_cast<const S*>(scan.in[kDecay].channel) + h0 : nullptr),
        bonus(F::kBonus ? static_cast<const S*>(scan.in[kBonus].channel) + h0 : nullptr) {}

  template <class L>
  MRU_INLINE V score_at(L lanes, int64_t j, int64_t step) const {
    return load(lanes, scores.row(step) + j);
  }
  template <class L>
  MRU_INLINE V decay_at(L lanes, int64_t j, int64_t step) const {
    if constexpr (F::kKind == Decay::kStream) return load(lanes, decays.row(step) + j);
    else if constexpr (F::kKind == Decay::kHead) return load(lanes, decay + j);
    else return zero<V>();
  }
  template <class L>
  MRU_INLINE V bonus_at(L lanes, int64_t j) const {
    if constexpr (F::kBonus) return load(lanes, bonus + j);
    else return zero<V>();
  }
  template <class L>
  MRU_INLINE V value_at(L lanes, int64_t j, int64_t step) const {
    return load(lanes, values.row(step) + j);
  }
};

// The parts of a state row that belong to the heads [h0, h1).
template <class S>
struct StateRow {
  S *mean, *Z, *z, *decay;
  template <class Data>
  StateRow(const HeadScan& scan, Data* row, int64_t h0)
      : mean((S*)row + h0 * (scan.channels / scan.heads)),
        Z((S*)row + scan.channels + h0),
        z(Z + scan.heads),
        decay(z + scan.heads) {}
};

inline bool is_border(const HeadScan& scan, const Segment& segment, int64_t step) {
  return step % scan.chunk == 0 && step < segment.length;
}
// The row of the state that enters the chunk at `step` of the segment's sequence.
template <class S>
S* border_row(const HeadScan& scan, const Segment& segment, int64_t step) {
  const int64_t row = segment.batch * scan.checkpoint_rows + segment.start / scan.chunk + step / scan.chunk - 1;
  return static_cast<S*>(scan.checkpoints) + row * (scan.channels + 2 * scan.heads);
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t end_of_chunk(const HeadScan& scan, const Segment& segment, int64_t step) {
  return least((step / scan.chunk + 1) * scan.chunk, segment.end);
}

// The weights of heads inside a chunk, as rows.
template <class F>
struct Weights {
  using S = typename F::S;
  S *q, *m, *c;

  Weights(S* scratch, int64_t heads) : q(scratch), m(q + heads), c(m + heads) {}
  template <class L>
  MRU_INLINE Weight<typename F::V> get(L lanes, int64_t j) const {
    return {load(lanes, q + j), load(lanes, m + j), load(lanes, c + j)};
  }
  template <class L>
  MRU_INLINE void put(L lanes, int64_t j, const Weight<typename F::V>& w) const {
    store(lanes, q + j, w.q), store(lanes, m + j, w.m), store(lanes, c + j, w.c);
  }
  void open_all(int64_t heads, const StateRow<S>& state) const {
    for_lanes<F>(heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
      put(lanes, j, open(load(lanes, state.Z + j), load(lanes, state.z + j)));
    });
  }
  void close_all(int64_t heads, const StateRow<S>& state) const {
    for_lanes<F>(heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
      const auto pair = close(get(lanes, j));
      store(lanes, state.Z + j, pair.hi), store(lanes, state.z + j, pair.lo);
    });
  }
};

// ------------------------------------------------------------------------------------------------ forward

// How y and the mean are mixed at a step (Share::k).
template <class F>
struct Mixes {
  typename F::V y, mean;
};
template <class F>
MRU_INLINE Mixes<F> mixes_at(typename F::V score, typename F::V decay, typename F::V bonus,
                             Weight<typename F::V>& weight) {
  Mixes<F> mixes;
  if constexpr (F::kBonus) mixes.y = read(score, bonus, weight).k;
  mixes.mean = update<F::kDecay>(score, decay, weight).k;
  return mixes;
}

// Scans [begin, end) of one chunk. kOwn: every channel is a head. kWrites: whether y is wanted.
template <class F, bool kOwn, bool kWrites>
void forward_chunk(const Inputs<F>& in, Steps<typename F::T> y, int64_t begin, int64_t end, const Weights<F>& weights,
                   typename F::S* mean, typename F::S* mixes) {
  using S = typename F::S;
  using V = typename F::V;
  for (int64_t step = begin; step < end; step += kTile) {
    const int64_t steps = least(kTile, end - step), heads = in.heads;
    const auto channels = [&](auto lanes, int64_t d, int64_t h) __attribute__((always_inline)) {
      V mean_now = load(lanes, mean + d);
      Weight<V> w;
      V bonus;
      if constexpr (kOwn) w = weights.get(lanes, d), bonus = in.bonus_at(lanes, d);
      for (int64_t t = step; t < step + steps; ++t) {
        Mixes<F> k;
        if constexpr (kOwn) {
          prefetch(in.scores.row(t + kTile) + d);
          k = mixes_at<F>(in.score_at(lanes, d, t), in.decay_at(lanes, d, t), bonus, w);
        } else {
          const S* const row = mixes + 2 * (t - step) * heads + h;
          k.mean = splat<V>(row[0]);
          if constexpr (F::kBonus) k.y = splat<V>(row[heads]);
        }
        const V v = in.value_at(lanes, d, t);
        prefetch(in.values.row(t + kTile) + d);
        V result;
        if constexpr (F::kBonus) result = mix(k.y, mean_now, v);
        mean_now = mix(k.mean, mean_now, v);
        if constexpr (!F::kBonus) result = mean_now;
        if constexpr (kWrites) {
          __builtin_prefetch(y.row(t + kTile) + d, 1, 3);
          store(lanes, y.row(t) + d, result);
        }
      }
      if constexpr (kOwn) weights.put(lanes, d, w);
      store(lanes, mean + d, mean_now);
    };
    if constexpr (kOwn) {
      for_lanes<F>(heads, [&](auto lanes, int64_t d) __attribute__((always_inline)) { channels(lanes, d, d); });
    } else {
      for_lanes<F>(heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
        Weight<V> w = weights.get(lanes, h);
        const V bonus = in.bonus_at(lanes, h);
        for (int64_t t = step; t < step + steps; ++t) {
          const Mixes<F> k = mixes_at<F>(in.score_at(lanes, h, t), in.decay_at(lanes, h, t), bonus, w);
          S* const row = mixes + 2 * (t - step) * heads + h;
          store(lanes, row, k.mean);
          if constexpr (F::kBonus) store(lanes, row + heads, k.y);
        }
        weights.put(lanes, h, w);
      });
      for (int64_t h = 0; h < heads; ++h)
        for_lanes<F>(in.group, [&](auto lanes, int64_t g)
                                   __attribute__((always_inline)) { channels(lanes, h * in.group + g, h); });
    }
  }
}

template <class F, bool kOwn, bool kWrites>
void scan_segment(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* row, void* scratch) {
  using S = typename F::S;
  const Inputs<F> in(scan, segment, h0, h1);
  const Steps<typename F::T> y(scan, kWrites ? scan.h : Stream{}, segment, h0 * in.group);
  const StateRow<S> state(scan, row, h0);
  const Weights<F> weights(static_cast<S*>(scratch), in.heads);
  for (int64_t begin = segment.begin, end; begin < segment.end; begin = end) {
    end = end_of_chunk(scan, segment, begin);
    weights.open_all(in.heads, state);
    forward_chunk<F, kOwn, kWrites>(in, y, begin, end, weights, state.mean, weights.c + in.heads);
    weights.close_all(in.heads, state);
    if (!kWrites || !scan.checkpoints || !is_border(scan, segment, end)) continue;
    const StateRow<S> border(scan, border_row<S>(scan, segment, end), h0);
    __builtin_memcpy(border.mean, state.mean, in.channels * sizeof(S));
    __builtin_memcpy(border.Z, state.Z, in.heads * sizeof(S));
    __builtin_memcpy(border.z, state.z, in.heads * sizeof(S));
  }
}

template <class F>
void forward(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* state, void* scratch) {
  if (scan.channels == scan.heads) scan_segment<F, true, true>(scan, segment, h0, h1, state, scratch);
  else scan_segment<F, false, true>(scan, segment, h0, h1, state, scratch);
}

template <class F>
void sum_decays(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* row) {
  using V = typename F::V;
  const Inputs<F> in(scan, segment, h0, h1);
  const StateRow<typename F::S> piece(scan, row, h0);
  for_lanes<F>(in.heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    Sum<V> decays;
    if constexpr (F::kDecay)
      for (int64_t t = segment.begin; t < segment.end; ++t) decays.add(in.decay_at(lanes, j, t));
    store(lanes, piece.decay + j, decays.total());
  });
}

template <class F>
void summarize(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* row, void* scratch) {
  using S = typename F::S;
  const StateRow<S> piece(scan, row, h0);
  const int64_t heads = h1 - h0, channels = heads * (scan.channels / scan.heads);
  __builtin_memset(piece.mean, 0, channels * sizeof(S));
  __builtin_memset(piece.z, 0, heads * sizeof(S));
  for (int64_t j = 0; j < heads; ++j) piece.Z[j] = -kInfinity<S>;
  sum_decays<F>(scan, segment, h0, h1, row);
  if (scan.channels == scan.heads) scan_segment<F, true, false>(scan, segment, h0, h1, row, scratch);
  else scan_segment<F, false, false>(scan, segment, h0, h1, row, scratch);
}

// ------------------------------------------------------------------------------------------------ backward

// What the adjoint needs of the steps of a chunk: [chunk][kHeadRows][width]. `e` is signed: its sign bit says that the past
// has it as its share a, and else the step as b. `read_e` and `read_r` belong to a bonus.
template <class F>
struct Records {
  using S = typename F::S;
  using V = typename F::V;
  S* rows;
  int64_t chunk, width;

  MRU_INLINE S* at(int row, int64_t t) const { return rows + (t * kHeadRows + row) * width; }
  S* end() const { return rows + kHeadRows * chunk * width; }

  struct Step {
    V e, r, q, read_e, read_r;
  };
  template <class L>
  MRU_INLINE void put(L lanes, int64_t t, int64_t j, const Step& s) const {
    store(lanes, at(0, t) + j, s.e), store(lanes, at(1, t) + j, s.r), store(lanes, at(2, t) + j, s.q);
    if constexpr (F::kBonus) store(lanes, at(3, t) + j, s.read_e), store(lanes, at(4, t) + j, s.read_r);
  }
  template <class L>
  MRU_INLINE Step get(L lanes, int64_t t, int64_t j) const {
    Step s{load(lanes, at(0, t) + j), load(lanes, at(1, t) + j), load(lanes, at(2, t) + j), V{}, V{}};
    if constexpr (F::kBonus) s.read_e = load(lanes, at(3, t) + j), s.read_r = load(lanes, at(4, t) + j);
    return s;
  }
  // The record of one head in all lanes.
  MRU_INLINE Step all(int64_t t, int64_t h) const {
    Step s{splat<V>(at(0, t)[h]), splat<V>(at(1, t)[h]), splat<V>(at(2, t)[h]), V{}, V{}};
    if constexpr (F::kBonus) s.read_e = splat<V>(at(3, t)[h]), s.read_r = splat<V>(at(4, t)[h]);
    return s;
  }
};

// The factors of a Share from a record.
template <class V>
struct Factors {
  V a, b;
  MRU_INLINE explicit Factors(V e)
      : a(Functions<V>::has_sign(e) ? Lanes<V>::abs(e) : splat<V>(1)), b(Functions<V>::has_sign(e) ? splat<V>(1) : e) {}
};
template <class V>
MRU_INLINE V k_of(V e, V r, V q) {
  return Functions<V>::has_sign(e) ? -((Lanes<V>::abs(e) * q) * r) : e * r;
}
template <class V>
MRU_INLINE V e_of(const Share<V>& s) {
  return Functions<V>::has_sign(s.k) ? -s.a : s.b;
}

// Scans the heads of a chunk and keeps the records. kOwn: also the means, `means` [chunk][kLanes].
template <class F, bool kOwn, class L>
MRU_INLINE void record(const Inputs<F>& in, L lanes, int64_t j, int64_t begin, int64_t end, const Records<F>& records,
                       int64_t column, const typename F::S* mean, const Steps<const typename F::T>& grads,
                       typename F::S* means, Weight<typename F::V>& w) {
  using V = typename F::V;
  V mean_now;
  if constexpr (kOwn) mean_now = load(lanes, mean + j);
  const V bonus = in.bonus_at(lanes, j);
  for (int64_t t = begin; t < end; ++t) {
    const V score = in.score_at(lanes, j, t);
    typename Records<F>::Step s;
    s.q = w.q;
    if constexpr (F::kBonus) {
      const Share<V> reads = read(score, bonus, w);
      s.read_e = e_of(reads), s.read_r = reads.r;
    }
    const Share<V> share = update<F::kDecay>(score, in.decay_at(lanes, j, t), w);
    s.e = e_of(share), s.r = share.r;
    records.put(lanes, t - begin, column, s);
    if constexpr (kOwn) {
      store_raw(Full<F::kLanes>{}, means + (t - begin) * F::kLanes, mean_now);
      mean_now = mix(share.k, mean_now, in.value_at(lanes, j, t));
      const int64_t next = t - records.chunk;  // in the chunk to the left
      prefetch(in.scores.row(next) + j), prefetch(in.values.row(next) + j), prefetch(grads.row(next) + j);
    }
  }
  if constexpr (kOwn) store_raw(Full<F::kLanes>{}, means + (end - begin) * F::kLanes, mean_now);
}

// What a step gives to the gradients of its head, before it is summed over the channels.
template <class F>
struct Terms {
  typename F::V score{}, decay{}, bonus{};
};
// Takes the adjoint of a vector of channels through a step from the right, and returns dL/dv.
template <class F>
MRU_INLINE typename F::V pull(const typename Records<F>::Step& s, typename F::V v, typename F::V mean,
                              typename F::V after, typename F::V g, Adjoint<typename F::V>& adjoint, Terms<F>& terms) {
  using V = typename F::V;
  const Factors<V> step(s.e);
  if constexpr (!F::kBonus) add_read(adjoint, splat<V>(1), g * s.r, after);
  terms.score = of_score(adjoint, v);
  if constexpr (F::kDecay) terms.decay = of_score(adjoint, mean);
  V dv = step.b * adjoint.lambda;
  pass(adjoint, step.a);
  if constexpr (F::kBonus) {
    const Factors<V> reads(s.read_e);
    const V y = mix(k_of(s.read_e, s.read_r, s.q), mean, v), gr = g * s.read_r;
    terms.bonus = of_bonus(gr, v, y);
    dv += reads.b * gr;
    add_read(adjoint, reads.a, gr, y);
  }
  return dv;
}

// The gradients of the heads: written for streams, summed for [H].
template <class F>
struct HeadGradients {
  using T = typename F::T;
  using S = typename F::S;
  using V = typename F::V;
  Steps<T> scores, decays;
  S *of_decay, *of_bonus;  // rows: the sums, and at `lost` elements from there what they lost
  int64_t lost;

  HeadGradients(const HeadScan& scan, const Segment& segment, int64_t h0, void* sums)
      : scores(scan, scan.grad_in[kScore], segment, h0),
        decays(scan, scan.grad_in[kDecay], segment, h0),
        of_decay(static_cast<S*>(sums) + h0),
        of_bonus(of_decay + 2 * scan.heads),
        lost(scan.heads) {}

  // Plain sums over a few steps.
  struct Partial {
    V decay{}, bonus{};
  };
  template <class L>
  MRU_INLINE void write(L lanes, int64_t step, int64_t j, const typename Records<F>::Step& s, const Terms<F>& terms,
                        Partial& partial) const {
    const Factors<V> factors(s.e);
    V ds = factors.b * terms.score;
    if constexpr (F::kBonus) {
      const V own = Factors<V>(s.read_e).b * terms.bonus;
      ds += own;
      partial.bonus += own;
    }
    store(lanes, scores.row(step) + j, ds);
    if constexpr (F::kDecay) {
      const V dl = (factors.a * s.q) * terms.decay;
      if constexpr (F::kKind == Decay::kStream) store(lanes, decays.row(step) + j, dl);
      else partial.decay += dl;
    }
  }
  template <class L>
  MRU_INLINE void flush(L lanes, int64_t j, Partial& partial) const {
    if constexpr (F::kKind == Decay::kHead) add(lanes, of_decay + j, partial.decay);
    if constexpr (F::kBonus) add(lanes, of_bonus + j, partial.bonus);
    partial = {};
  }

 private:
  template <class L>
  MRU_INLINE void add(L lanes, S* at, V term) const {
    Sum<V> sum{load(lanes, at), load(lanes, at + lost)};
    sum.add(term);
    store(lanes, at, sum.sum), store(lanes, at + lost, sum.lost);
  }
};

// One chunk of channels that are heads of their own, a vector at a time.
template <class F>
void backward_own(const Inputs<F>& in, const Steps<const typename F::T>& grads, const Steps<typename F::T>& grad_values,
                  const HeadGradients<F>& heads, int64_t begin, int64_t end, const StateRow<typename F::S>& border,
                  const StateRow<typename F::S>& carry, const Records<F>& records) {
  using V = typename F::V;
  constexpr int N = F::kLanes;
  typename F::S* const means = records.end();
  for_lanes<F>(in.heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    Weight<V> w = open(load(lanes, border.Z + j), load(lanes, border.z + j));
    const V q_start = w.q;
    record<F, true>(in, lanes, j, begin, end, records, 0, border.mean, grads, means, w);
    V after = load_raw<V>(Full<N>{}, means + (end - begin) * N);
    auto adjoint = open_adjoint(load(lanes, carry.mean + j), load(lanes, carry.Z + j), after, w.q);
    typename HeadGradients<F>::Partial partial;
    for (int64_t t = end - 1; t >= begin; --t) {
      const auto s = records.get(lanes, t - begin, 0);
      const V v = in.value_at(lanes, j, t), mean = load_raw<V>(Full<N>{}, means + (t - begin) * N);
      __builtin_prefetch(heads.scores.row(t - records.chunk) + j, 1, 3);  // in the chunk to the left
      __builtin_prefetch(grad_values.row(t - records.chunk) + j, 1, 3);
      Terms<F> terms;
      store(lanes, grad_values.row(t) + j, pull<F>(s, v, mean, after, load(lanes, grads.row(t) + j), adjoint, terms));
      heads.write(lanes, t, j, s, terms, partial);
      if (t % kTile == 0) heads.flush(lanes, j, partial);
      after = mean;
    }
    V d_mean;
    store(lanes, carry.Z + j, close_adjoint(adjoint, after, q_start, d_mean));
    store(lanes, carry.mean + j, d_mean);
  });
}

// Sums over a head's channels in kMostLanes parts: channel g belongs to part g % kMostLanes, on every instruction set.
template <class F, class L>
MRU_INLINE void add_part(L lanes, typename F::S* parts, int64_t g, typename F::V term) {
  typename F::S* const at = parts + g % kMostLanes;
  store(lanes, at, load(lanes, at) + term);
}
template <class S>
MRU_INLINE S sum_of_parts(const S* parts) {
  S sum[kMostLanes];
  __builtin_memcpy(sum, parts, sizeof sum);
  for (int64_t width = kMostLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

// One chunk of heads with several channels.
template <class F>
void backward_shared(const Inputs<F>& in, const Steps<const typename F::T>& grads,
                     const Steps<typename F::T>& grad_values, const HeadGradients<F>& heads, int64_t begin, int64_t end,
                     const StateRow<typename F::S>& border, const StateRow<typename F::S>& carry,
                     const Records<F>& records) {
  using S = typename F::S;
  using V = typename F::V;
  constexpr int N = F::kLanes;
  constexpr int64_t kParts = kMostLanes;
  const int64_t steps = end - begin, width = records.width;
  S* const terms = records.end();                      // [3][chunk][heads]: sums over the channels of each head
  S* const means = terms + 3 * records.chunk * width;  // [chunk][kLanes]: of one vector of channels
  S* const parts = means + records.chunk * kParts;     // [3][chunk][kParts], and one more row
  S* const q_start = parts + (3 * records.chunk + 1) * kParts;
  S* const q_end = q_start + width;
  const auto part = [&](int which, int64_t t) { return parts + (which * records.chunk + t) * kParts; };
  const auto term = [&](int which, int64_t t) { return terms + (which * records.chunk + t) * width; };
  S* const of_start = part(3, 0);

  for_lanes<F>(in.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    Weight<V> w = open(load(lanes, border.Z + h), load(lanes, border.z + h));
    store(lanes, q_start + h, w.q);
    record<F, false>(in, lanes, h, begin, end, records, h, border.mean, grads, means, w);
    store(lanes, q_end + h, w.q);
  });
  for (int64_t h = 0; h < in.heads; ++h) {
    __builtin_memset(parts, 0, (3 * records.chunk + 1) * kParts * sizeof(S));
    for_lanes<F>(in.group, [&](auto lanes, int64_t g) __attribute__((always_inline)) {
      const int64_t d = h * in.group + g;
      V after = load(lanes, border.mean + d);
      for (int64_t t = 0; t < steps; ++t) {
        store_raw(Full<N>{}, means + t * N, after);
        const auto s = records.all(t, h);
        after = mix(k_of(s.e, s.r, s.q), after, in.value_at(lanes, d, begin + t));
      }
      V d_Z{};
      if (g == 0) d_Z[0] = carry.Z[h];
      auto adjoint = open_adjoint(load(lanes, carry.mean + d), d_Z, after, splat<V>(q_end[h]));
      for (int64_t t = steps - 1; t >= 0; --t) {
        const V v = in.value_at(lanes, d, begin + t), mean = load_raw<V>(Full<N>{}, means + t * N);
        const V grad = load(lanes, grads.row(begin + t) + d);
        const int64_t next = begin + t - records.chunk;  // in the chunk to the left
        prefetch(in.values.row(next) + d), prefetch(grads.row(next) + d);
        __builtin_prefetch(grad_values.row(next) + d, 1, 3);
        Terms<F> own;
        store(lanes, grad_values.row(begin + t) + d, pull<F>(records.all(t, h), v, mean, after, grad, adjoint, own));
        add_part<F>(lanes, part(0, t), g, own.score);
        if constexpr (F::kDecay) add_part<F>(lanes, part(1, t), g, own.decay);
        if constexpr (F::kBonus) add_part<F>(lanes, part(2, t), g, own.bonus);
        after = mean;
      }
      V d_mean;
      add_part<F>(lanes, of_start, g, close_adjoint(adjoint, after, splat<V>(q_start[h]), d_mean));
      store(lanes, carry.mean + d, d_mean);
    });
    for (int64_t t = 0; t < steps; ++t) {
      term(0, t)[h] = sum_of_parts(part(0, t));
      if constexpr (F::kDecay) term(1, t)[h] = sum_of_parts(part(1, t));
      if constexpr (F::kBonus) term(2, t)[h] = sum_of_parts(part(2, t));
    }
    carry.Z[h] = sum_of_parts(of_start);
  }
  for_lanes<F>(in.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    typename HeadGradients<F>::Partial partial;
    for (int64_t t = steps - 1; t >= 0; --t) {
      Terms<F> sums{load(lanes, term(0, t) + h), V{}, V{}};
      if constexpr (F::kDecay) sums.decay = load(lanes, term(1, t) + h);
      if constexpr (F::kBonus) sums.bonus = load(lanes, term(2, t) + h);
      heads.write(lanes, begin + t, h, records.get(lanes, t, h), sums, partial);
      if (t % kTile == 0) heads.flush(lanes, h, partial);
    }
  });
}

template <class F>
void backward(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* adjoint, void* sums,
              void* scratch) {
  using T = typename F::T;
  using S = typename F::S;
  const Inputs<F> in(scan, segment, h0, h1);
  const Steps<const T> grads(scan, scan.grad_h, segment, h0 * in.group);
  const Steps<T> grad_values(scan, scan.grad_in[kValue], segment, h0 * in.group);
  const HeadGradients<F> heads(scan, segment, h0, sums);
  const StateRow<S> carry(scan, adjoint, h0);
  const bool own = scan.channels == scan.heads;
  const Records<F> records{static_cast<S*>(scratch), least(scan.chunk, scan.time), own ? F::kLanes : in.heads};
  for (int64_t end = segment.end, begin; end > segment.begin; end = begin) {
    begin = (end - 1) / scan.chunk * scan.chunk;
    const S* const row =
        begin > 0 ? border_row<S>(scan, segment, begin)
                  : static_cast<const S*>(scan.initial) + segment.sequence * (scan.channels + 2 * scan.heads);
    const StateRow<S> border(scan, const_cast<S*>(row), h0);
    const auto chunk = own ? &backward_own<F> : &backward_shared<F>;
    chunk(in, grads, grad_values, heads, begin, end, border, carry, records);
  }
}

// ------------------------------------------------------------------------------------------------ rows of states

template <class F>
void carry(const HeadScan& scan, const void* piece_row, void* state_row) {
  using S = typename F::S;
  using V = typename F::V;
  const StateRow<S> piece(scan, const_cast<void*>(piece_row), 0), state(scan, state_row, 0);
  const int64_t group = scan.channels / scan.heads;
  for_lanes<F>(scan.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    Piece<V> first{zero<V>(), load(lanes, state.Z + h), load(lanes, state.z + h)};
    const V k = then(first, Piece<V>{load(lanes, piece.decay + h), load(lanes, piece.Z + h), load(lanes, piece.z + h)});
    store(lanes, state.Z + h, first.Z), store(lanes, state.z + h, first.z);
    for (int64_t i = 0; i < least(F::kLanes, scan.heads - h); ++i)
      for_lanes<F>(group, [&](auto channels, int64_t g) __attribute__((always_inline)) {
        const int64_t d = (h + i) * group + g;
        store(channels, state.mean + d,
              mix(splat<V>(k[i]), load(channels, state.mean + d), load(channels, piece.mean + d)));
      });
  });
}

template <class F>
void carry_adjoint(const HeadScan& scan, const void* piece_row, const void* start_row, const void* end_row,
                   const void* offset_row, void* adjoint_row) {
  using S = typename F::S;
  using V = typename F::V;
  const StateRow<S> piece(scan, const_cast<void*>(piece_row), 0), start(scan, const_cast<void*>(start_row), 0),
      end(scan, const_cast<void*>(end_row), 0), offset(scan, const_cast<void*>(offset_row), 0),
      adjoint(scan, adjoint_row, 0);
  const int64_t group = scan.channels / scan.heads;
  for_lanes<F>(scan.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    const V f = adjoint_factor(Pair<V>{load(lanes, start.Z + h), load(lanes, start.z + h)},
                               Pair<V>{load(lanes, end.Z + h), load(lanes, end.z + h)}, load(lanes, piece.decay + h));
    for (int64_t i = 0; i < least(F::kLanes, scan.heads - h); ++i) {
      S parts[kMostLanes] = {};
      for_lanes<F>(group, [&](auto channels, int64_t g) __attribute__((always_inline)) {
        const int64_t d = (h + i) * group + g;
        const V d_mean = load(channels, adjoint.mean + d);
        const V moved = load(channels, start.mean + d) - load(channels, end.mean + d);
        add_part<F>(channels, parts, g, d_mean * moved);
        store(channels, adjoint.mean + d, splat<V>(f[i]) * d_mean + load(channels, offset.mean + d));
      });
      S& d_Z = adjoint.Z[h + i];
      d_Z = f[i] * (d_Z + sum_of_parts(parts)) + offset.Z[h + i];
    }
  });
}

template <class F>
void total(const HeadScan& scan, const void* sums, int64_t count, int which, void* total) {
  using S = typename F::S;
  for_lanes<F>(scan.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    Sum<typename F::V> all;
    for (int64_t i = 0; i < count; ++i) {
      const S* const row = static_cast<const S*>(sums) + (4 * i + which) * scan.heads + h;
      all.add(load(lanes, row));
      all.lost += load(lanes, row + scan.heads);
    }
    store(lanes, static_cast<S*>(total) + h, all.total());
  });
}

template <class F>
constexpr HeadKernels table = {.forward = &forward<F>,
                               .summarize = &summarize<typename F::WithoutBonus>,
                               .sum_decays = &sum_decays<typename F::WithoutBonus>,
                               .backward = &backward<F>,
                               .carry = &carry<F>,
                               .carry_adjoint = &carry_adjoint<F>,
                               .total = &total<F>};

template <class T, Decay kDecay>
const HeadKernels& with_bonus(const HeadScan& scan) {
  return scan.in[kBonus].channel ? table<Form<T, kDecay, true>> : table<Form<T, kDecay, false>>;
}
template <class T>
const HeadKernels& with_decay(const HeadScan& scan) {
  if (scan.in[kDecay].channel) return with_bonus<T, Decay::kHead>(scan);
  return scan.in[kDecay].stream.data ? with_bonus<T, Decay::kStream>(scan) : with_bonus<T, Decay::kNone>(scan);
}

}  // namespace

template <Isa>
const HeadKernels& head_kernels(const HeadScan& scan) {
  switch (scan.dtype) {
    case Dtype::kFloat64: return with_decay<double>(scan);
    case Dtype::kBFloat16: return with_decay<BFloat16>(scan);
    case Dtype::kFloat16: return with_decay<Float16>(scan);
    default: return with_decay<float>(scan);
  }
}

template const HeadKernels& head_kernels<Isa::MRU_ISA>(const HeadScan&);

}  // namespace mru::softmax
