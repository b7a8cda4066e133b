// The backward pass over a segment of time: a chunk is scanned again with its records kept, then its adjoint from the right.
#pragma once
#include "../../sum.h"
#include "rows.h"

namespace mru::softmax {
namespace {

// What the adjoint needs of the steps of a chunk: [chunk][kHeadRows][width]. The sign bit of e is set for a = |e|, b = 1, and
// clear for a = 1, b = e. `read_a` and `read_b` are a r and b r of the read. Rows that are not needed are not written.
template <class F>
struct Records {
  using S = typename F::S;
  using V = typename F::V;
  S* rows;
  int64_t chunk, width;

  S* end() const { return rows + kHeadRows * chunk * width; }

  struct Step {
    V e, q, r, read_a, read_b;
  };
  // With kOwn and a bonus r is not used.
  template <bool kOwn, class L>
  MRU_INLINE void put(L lanes, int64_t t, int64_t j, const Step& s) const {
    store(lanes, at(0, t) + j, s.e), store(lanes, at(1, t) + j, s.q);
    if constexpr (!kOwn || !F::kBonus) store(lanes, at(2, t) + j, s.r);
    if constexpr (F::kBonus) store(lanes, at(3, t) + j, s.read_a), store(lanes, at(4, t) + j, s.read_b);
  }
  template <class L>
  MRU_INLINE Step get(L lanes, int64_t t, int64_t j) const {
    return get(t, [&](const S* row) __attribute__((always_inline)) { return load(lanes, row + j); });
  }
  // The record of one head in all lanes.
  MRU_INLINE Step all(int64_t t, int64_t h) const {
    return get(t, [&](const S* row) __attribute__((always_inline)) { return splat<V>(row[h]); });
  }

 private:
  MRU_INLINE S* at(int row, int64_t t) const { return rows + (t * kHeadRows + row) * width; }
  template <class Read>
  MRU_INLINE Step get(int64_t t, Read read) const {
    Step s{read(at(0, t)), read(at(1, t)), read(at(2, t)), V{}, V{}};
    if constexpr (F::kBonus) s.read_a = read(at(3, t)), s.read_b = read(at(4, t));
    return s;
  }
};

// Share::k from a record.
template <class V>
MRU_INLINE V k_of(V e, V r, V q) {
  return (e * (Functions<V>::has_sign(e) ? q : splat<V>(1))) * r;
}
// Scans the heads of a chunk and keeps the records. kOwn: also the means, `means` [chunk + 1][kLanes].
template <class F, bool kOwn, class L>
MRU_INLINE void record(const Inputs<F>& in, L lanes, int64_t j, int64_t begin, int64_t end, const Records<F>& records,
                       int64_t column, const typename F::S* mean, typename F::S* means, Weight<typename F::V>& w,
                       const Steps<const typename F::T>& grads, Sweep& to_left) {
  using V = typename F::V;
  const V read_factor = in.read_factor_at(lanes, j);
  V mean_now;
  if constexpr (kOwn) mean_now = load(lanes, mean + j);
  for (int64_t t = begin; t < end; ++t) {
    const auto ratios = weigh_step(in, lanes, j, t, read_factor, w.m, w.c);
    const auto [read, update] = share_step<F>(ratios, read_factor, w.q);
    typename Records<F>::Step s{ratios.update, w.q, update.r, V{}, V{}};
    if constexpr (F::kBonus) s.read_a = read.a * read.r, s.read_b = read.b * read.r;
    records.template put<kOwn>(lanes, t - begin, column, s);
    w.q = update.total;
    if constexpr (kOwn) {
      to_left.template fetch<F::kLanes>(in.scores, in.values, grads);
      store_raw(Full<F::kLanes>{}, means + (t - begin) * F::kLanes, mean_now);
      mean_now = mix(update, mean_now, in.value_at(lanes, j, t));
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
  const Ratio<V> step = ratio_of(s.e);
  if constexpr (!F::kBonus) add_read(adjoint, splat<V>(1), g * s.r, after);
  terms.score = of_score(adjoint, v);
  if constexpr (F::kDecay) terms.decay = of_score(adjoint, mean);
  V dv = step.b() * adjoint.lambda;
  pass(adjoint, step.a());
  if constexpr (F::kBonus) {
    const V past = s.read_a * s.q, apart = v - mean, from_v = past * apart;  // past + read_b = 1, so v - y = from_v
    const V y = past < s.read_b ? v - from_v : Functions<V>::multiply_add(s.read_b, apart, mean);
    terms.bonus = g * from_v;
    dv = Functions<V>::multiply_add(s.read_b, g, dv);
    add_read(adjoint, s.read_a, g, y);
  }
  return dv;
}

// The gradients of the heads: written for streams, summed for [H].
template <class F>
struct HeadGradients {
  using T = typename F::T;
  using S = typename F::S;
  using V = typename F::V;
  Results<F> scores, decays;
  S *of_decay, *of_bonus;  // rows: the sums, and at `lost` elements from there what they lost
  int64_t lost;

  HeadGradients(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* sums)
      : scores(scan, scan.grad_in[kScore], segment, h0, h1 - h0),
        decays(scan, scan.grad_in[kDecay], segment, h0, h1 - h0),
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
    const Ratio<V> ratio = ratio_of(s.e);
    V ds = ratio.b() * terms.score;
    if constexpr (F::kBonus) {
      const V own = s.read_b * terms.bonus;
      ds += own;
      partial.bonus += own;
    }
    scores.put(lanes, step, j, ds);
    if constexpr (F::kDecay) {
      const V dl = (ratio.a() * s.q) * terms.decay;
      if constexpr (F::kKind == Decay::kStream) decays.put(lanes, step, j, dl);
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
void backward_own(const Inputs<F> in, const Steps<const typename F::T> grads, const Results<F> grad_values,
                  const HeadGradients<F> heads, int64_t begin, int64_t end, const StateRow<typename F::S> border,
                  const StateRow<typename F::S> carry, const Records<F> records) {
  using V = typename F::V;
  constexpr int N = F::kLanes;
  typename F::S* const means = records.end();
  Sweep inputs_to_left(begin - records.chunk, begin, in.heads), results_to_left = inputs_to_left;
  for_lanes<F>(in.heads, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
    Weight<V> w = open(load(lanes, border.Z + j), load(lanes, border.z + j));
    const V q_start = w.q;
    record<F, true>(in, lanes, j, begin, end, records, 0, border.mean, means, w, grads, inputs_to_left);
    V after = load_raw<V>(Full<N>{}, means + (end - begin) * N);
    auto adjoint = open_adjoint(load(lanes, carry.mean + j), load(lanes, carry.Z + j), after, w.q);
    typename HeadGradients<F>::Partial partial;
    for (int64_t t = end - 1; t >= begin; --t) {
      const auto s = records.get(lanes, t - begin, 0);
      const V v = in.value_at(lanes, j, t), mean = load_raw<V>(Full<N>{}, means + (t - begin) * N);
      Terms<F> terms;
      const V dv = pull<F>(s, v, mean, after, load(lanes, grads.row(t) + j), adjoint, terms);
      after = mean;
      if (!grad_values.first) continue;
      if (!(heads.scores.non_temporal && grad_values.non_temporal)) results_to_left.fetch<N>(heads.scores, grad_values);
      grad_values.put(lanes, t, j, dv);
      heads.write(lanes, t, j, s, terms, partial);
      if (t % kTile == 0) heads.flush(lanes, j, partial);
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

// The rows that `backward_shared` keeps behind the records.
template <class F>
struct SharedRows {
  using S = typename F::S;
  static constexpr int64_t kParts = kMostLanes;
  const int64_t chunk, width;
  S* const terms;                  // [3][chunk][heads]: sums over the channels of each head
  S* const means;                  // [chunk][kLanes]: of one vector of channels
  S* const parts;                  // [3][chunk][kParts], and one more row
  S *const q_start, *const q_end;  // [heads]

  explicit SharedRows(const Records<F>& records)
      : chunk(records.chunk),
        width(records.width),
        terms(records.end()),
        means(terms + 3 * chunk * width),
        parts(means + chunk * kParts),
        q_start(parts + (3 * chunk + 1) * kParts),
        q_end(q_start + width) {}

  MRU_INLINE S* part(int which, int64_t t) const { return parts + (which * chunk + t) * kParts; }
  MRU_INLINE S* term(int which, int64_t t) const { return terms + (which * chunk + t) * width; }
  MRU_INLINE void clear_parts() const { __builtin_memset(parts, 0, (3 * chunk + 1) * kParts * sizeof(S)); }
  // Adds the terms of the channels from g on to the parts.
  template <class L>
  MRU_INLINE void add(L lanes, int64_t g, int64_t t, const Terms<F>& of_channels) const {
    add_part<F>(lanes, part(0, t), g, of_channels.score);
    if constexpr (F::kDecay) add_part<F>(lanes, part(1, t), g, of_channels.decay);
    if constexpr (F::kBonus) add_part<F>(lanes, part(2, t), g, of_channels.bonus);
  }
  template <class L>
  MRU_INLINE Terms<F> sums(L lanes, int64_t h, int64_t t) const {
    Terms<F> sums{load(lanes, term(0, t) + h)};
    if constexpr (F::kDecay) sums.decay = load(lanes, term(1, t) + h);
    if constexpr (F::kBonus) sums.bonus = load(lanes, term(2, t) + h);
    return sums;
  }
  // Adds up the parts of a head's terms.
  MRU_INLINE void add_up(int64_t h, int64_t steps) const {
    for (int64_t t = 0; t < steps; ++t) {
      term(0, t)[h] = sum_of_parts(part(0, t));
      if constexpr (F::kDecay) term(1, t)[h] = sum_of_parts(part(1, t));
      if constexpr (F::kBonus) term(2, t)[h] = sum_of_parts(part(2, t));
    }
  }
};

// One chunk of heads with several channels.
template <class F>
void backward_shared(const Inputs<F> in, const Steps<const typename F::T> grads, const Results<F> grad_values,
                     const HeadGradients<F> heads, int64_t begin, int64_t end, const StateRow<typename F::S> border,
                     const StateRow<typename F::S> carry, const Records<F> records) {
  using V = typename F::V;
  constexpr int N = F::kLanes;
  const int64_t steps = end - begin;
  const SharedRows<F> rows(records);
  const auto means = rows.means, of_start = rows.part(3, 0);
  Sweep to_left(begin - records.chunk, begin, in.channels), results_to_left = to_left;

  for_lanes<F>(in.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    Weight<V> w = open(load(lanes, border.Z + h), load(lanes, border.z + h));
    store(lanes, rows.q_start + h, w.q);
    record<F, false>(in, lanes, h, begin, end, records, h, border.mean, means, w, grads, to_left);
    store(lanes, rows.q_end + h, w.q);
  });
  for (int64_t h = 0; h < in.heads; ++h) {
    rows.clear_parts();
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
      auto adjoint = open_adjoint(load(lanes, carry.mean + d), d_Z, after, splat<V>(rows.q_end[h]));
      for (int64_t t = steps - 1; t >= 0; --t) {
        const V v = in.value_at(lanes, d, begin + t), mean = load_raw<V>(Full<N>{}, means + t * N);
        const V grad = load(lanes, grads.row(begin + t) + d);
        to_left.fetch<N>(in.values, grads);
        Terms<F> own;
        const V dv = pull<F>(records.all(t, h), v, mean, after, grad, adjoint, own);
        after = mean;
        if (!grad_values.first) continue;
        if (!grad_values.non_temporal) results_to_left.fetch<N>(grad_values);
        grad_values.put(lanes, begin + t, d, dv);
        rows.add(lanes, g, t, own);
      }
      V d_mean;
      add_part<F>(lanes, of_start, g, close_adjoint(adjoint, after, splat<V>(rows.q_start[h]), d_mean));
      store(lanes, carry.mean + d, d_mean);
    });
    if (grad_values.first) rows.add_up(h, steps);
    carry.Z[h] = sum_of_parts(of_start);
  }
  if (!grad_values.first) return;
  for_lanes<F>(in.heads, [&](auto lanes, int64_t h) __attribute__((always_inline)) {
    typename HeadGradients<F>::Partial partial;
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Terms<F> sums = rows.sums(lanes, h, t);
      heads.write(lanes, begin + t, h, records.get(lanes, t, h), sums, partial);
      if (t % kTile == 0) heads.flush(lanes, h, partial);
    }
  });
}

// Computes the adjoint, and writes gradients if there are rows for them.
template <class F>
void backward(const HeadScan& scan, const Segment& segment, int64_t h0, int64_t h1, void* adjoint, void* sums,
              void* scratch) {
  using T = typename F::T;
  using S = typename F::S;
  const Inputs<F> in(scan, segment, h0, h1);
  const Steps<const T> grads(scan, scan.grad_h, segment, h0 * in.group);
  const HeadGradients<F> heads(scan, segment, h0, h1, sums);
  const StateRow<S> carry(scan, adjoint, h0);
  const bool own = scan.channels == scan.heads;
  const Results<F> grad_values(scan, scan.grad_in[kValue], segment, h0 * in.group, own ? in.channels : in.group);
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

}  // namespace
}  // namespace mru::softmax
