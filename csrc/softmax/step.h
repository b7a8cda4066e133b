// The softmax recurrence: y is a weighted mean of the values seen so far. Step i has the weight e^(score + decays since).
//
//   state         (mean, Z + z): the mean of a channel and the log of a head's total weight, in two floats. Empty: 0, -inf
//   inside chunk  (mean, q, m, c): the weight is e^(m + c) q. `open` and `close` convert at the borders of chunks
//
// Everything is a template over a value type V: a scalar (one CUDA thread) or a vector of lanes (CPU); see lanes.h. A head's
// values are the same for all its channels: Weight, Share, SegmentMap. The order of operations decides the precision, and a
// weight that is 0 or 1 must copy a value bit for bit, so nothing here may be reordered, or fused but by `multiply_add`.
#pragma once
#include <limits>

#include "../lanes.h"

namespace mru::softmax {

// Functions of scalars; csrc/softmax/cpu/functions.h has those of vectors.
template <class V>
struct Functions {
  // e^-|x|. A result below the least normal number may be 0.
  static MRU_INLINE V exp_of_minus_abs(V x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(V) == 4) {
      float y;
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(-std::fabs(x) * 1.4426950408889634f));
      return y;
    }
#endif
    return std::exp(-std::fabs(x));
  }
  static MRU_INLINE V log(V x) { return std::log(x); }
  static MRU_INLINE V log1p(V x) { return std::log1p(x); }
  // a b + c, rounded once or twice.
  static MRU_INLINE V multiply_add(V a, V b, V c) { return mru::multiply_add(a, b, c); }
  static MRU_INLINE bool has_sign(V x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(V) == 4) return __float_as_int(x) < 0;
#endif
    return std::signbit(x);
  }
};

template <class V>
constexpr typename Lanes<V>::Scalar kInfinity = std::numeric_limits<typename Lanes<V>::Scalar>::infinity();
template <class V>
constexpr typename Lanes<V>::Scalar kLowest = std::numeric_limits<typename Lanes<V>::Scalar>::lowest();  // finite

template <class V>
MRU_INLINE V zero() {
  return splat<V>(0);
}
template <class V>
MRU_INLINE auto is_infinite(V x) {
  return Lanes<V>::abs(x) == splat<V>(kInfinity<V>);
}
template <class V>
MRU_INLINE V inverse(V x) {  // 1 / 0 := 0. A NaN stays, which `x > 0` would lose
  return x == zero<V>() ? zero<V>() : reciprocal(x);
}

// The sum hi + lo of two floats.
template <class V>
struct Pair {
  V hi, lo;
};
// (hi + lo) + x. kFinite: the sum is not infinite.
template <bool kFinite = false, class V>
MRU_INLINE Pair<V> plus(V hi, V lo, V x) {
  const V low = x + lo, sum = hi + low, rest = low - (sum - hi);
  if constexpr (kFinite) return {sum, rest};
  else return {sum, is_infinite(sum) ? zero<V>() : rest};
}

// What a head's past weighs inside a chunk: e^(m + c) q.
template <class V>
struct Weight {
  V q, m, c;
};
// Without weight, m is the least finite number: every score is at least as large, and differences of finite numbers are numbers.
template <class V>
MRU_INLINE Weight<V> open(V Z, V z) {
  const auto empty = Z == splat<V>(-kInfinity<V>);
  return {empty ? zero<V>() : splat<V>(1), empty ? splat<V>(kLowest<V>) : Z, z};
}
template <class V>
MRU_INLINE Pair<V> close(const Weight<V>& weight) {
  const V w = weight.c + Functions<V>::log(weight.q), Z = weight.m + w, z = w - (Z - weight.m);
  const V size = Lanes<V>::abs(z);
  return {Z, size < splat<V>(kInfinity<V>) ? z : zero<V>()};
}

// How the weights of the past and of a new value compare; `gap` is the log of the new weight over that of the past.
template <class V>
struct Ratio {
  decltype(V{} > V{}) newer;  // whether the new weight is the larger
  V e;                        // e^-|gap|, with the sign bit set if `newer`
  // The weights of the past and of the new value (Share), in the scale in which the larger is 1.
  MRU_INLINE V a() const { return newer ? -e : splat<V>(1); }
  MRU_INLINE V b() const { return newer ? splat<V>(1) : e; }
};
template <class V>
MRU_INLINE Ratio<V> ratio(V gap) {
  const auto newer = gap > zero<V>();
  const V e = Functions<V>::exp_of_minus_abs(gap);
  return {newer, newer ? -e : e};
}

// How a mean is mixed from the past and a value: (a q mean + b v) / (a q + b).
template <class V>
struct Share {
  V a, b, r;  // r = 1 / (a q + b); 0 if there is no weight
  V k;        // what `mix` takes: the part of the past with the sign bit set, or that of the new value with it clear
  V total;    // a q + b
  decltype(V{} > V{}) newer;  // whether k has the sign bit set
};
template <class V>
MRU_INLINE Share<V> share(Ratio<V> ratio, V q) {
  const V one = splat<V>(1), part = ratio.e * (ratio.newer ? q : one);  // k before the division
  const V total = (ratio.newer ? one : q) + Lanes<V>::abs(part), r = inverse(total);
  return {ratio.a(), ratio.b(), r, part * r, total, ratio.newer};
}
// The mean. A part of 0 copies the other value.
template <class V, class Mask>
MRU_INLINE V mix(Mask newer, V k, V mean, V v) {
  return Functions<V>::multiply_add(k, v - mean, newer ? v : mean);
}
template <class V>
MRU_INLINE V mix(const Share<V>& share, V mean, V v) {
  return mix(share.newer, share.k, mean, v);
}
template <class V>
MRU_INLINE V mix(V k, V mean, V v) {
  return mix(Functions<V>::has_sign(k), k, mean, v);
}

// x - hi - lo, for a score x; a masked one, -inf, is that far from anything. kFinite: hi and lo are finite.
template <bool kFinite = false, class V>
MRU_INLINE V distance(V x, V hi, V lo) {
  const V least = splat<V>(-kInfinity<V>), difference = (x - hi) - lo;
  if constexpr (kFinite) return difference;
  else return x == least ? least : difference;
}

// A step of a head in two parts: m and c, and the ratio of the weights; then q. Together they are `update`, which decays the
// past and adds the weight of `score`. kFinite: m and c stay finite, as after decays that are moderate. A score or a state of
// +inf then gives NaN.
template <bool kDecay, bool kFinite = false, class V>
MRU_INLINE Ratio<V> weigh(V score, V decay, V& m, V& c) {
  Pair<V> past{m, c};
  if constexpr (kDecay) past = plus<kFinite>(m, c, decay);
  const Ratio<V> r = ratio(distance<kFinite>(score, past.hi, past.lo));
  m = r.newer ? score : past.hi, c = r.newer ? zero<V>() : past.lo;
  return r;
}
template <bool kDecay, class V>
MRU_INLINE Share<V> update(V score, V decay, Weight<V>& weight) {
  const Share<V> s = share(weigh<kDecay>(score, decay, weight.m, weight.c), weight.q);
  weight.q = s.total;
  return s;
}

// How a step with a bonus reads the past: before it decays, with its own weight e^(score + bonus). The difference comes first:
// score + bonus would round away what a large score has.
template <class V>
MRU_INLINE Ratio<V> weigh_read(V score, V bonus, V m, V c) {
  return ratio(distance(score, m, c) + bonus);
}
template <class V>
MRU_INLINE Share<V> read(V score, V bonus, const Weight<V>& before) {
  return share(weigh_read(score, bonus, before.m, before.c), before.q);
}

// How a step reads and how it updates by the ratio of the update alone, and one division: `factor` = e^(decay + bonus) turns
// the new weight after the decay into that with the bonus before it. Ratios are 0 below e^-87, so |decay + bonus| is at most
// kModerate: then every weight that is lost is less than e^-47 of the whole.
template <class V>
constexpr typename Lanes<V>::Scalar kModerate = 40;
template <class V>
struct ReadAndUpdate {
  Share<V> read, update;
};
template <class V>
MRU_INLINE ReadAndUpdate<V> read_and_update(Ratio<V> ratio, V factor, V q) {
  const V one = splat<V>(1), part = ratio.e * (ratio.newer ? q : one), smaller = Lanes<V>::abs(part);
  const V past = ratio.newer ? smaller : q, b = ratio.newer ? one : smaller, total = past + b;
  const V read_b = b * factor, read_total = past + read_b;
  const V both = inverse(total * read_total), r = both * read_total, read_r = both * total;
  const auto newer = past < read_b;
  const V read_k = (newer ? past : read_b) * (newer ? -read_r : read_r);
  return {{ratio.a(), read_b, read_r, read_k, read_total, newer}, {ratio.a(), b, r, part * r, total, ratio.newer}};
}

// ------------------------------------------------------------------------------------------------ segments of time

// What the steps of a segment do to a state: the sum of their decays, and the log of the weight that they leave from an empty
// state. The identity is (0, -inf, 0), and the mean of each channel 0.
template <class V>
struct SegmentMap {
  V decay, Z, z;
};
template <class V>
MRU_INLINE SegmentMap<V> no_steps() {
  return {zero<V>(), splat<V>(-kInfinity<V>), zero<V>()};
}
// `first` becomes: first, then second. Returns k: the mean is mix(k, mean of first, mean of second). A state is a map
// without decay.
template <class V>
MRU_INLINE V then(SegmentMap<V>& first, const SegmentMap<V>& second) {
  const Pair<V> past = plus(first.Z, first.z, second.decay);
  const V least = splat<V>(-kInfinity<V>);
  const V gap = second.Z == least ? least : ((second.Z - past.hi) - past.lo) + second.z;
  const auto newer = gap > zero<V>();
  const V e = Functions<V>::exp_of_minus_abs(gap), part = e / (splat<V>(1) + e);
  const Pair<V> sum = plus(newer ? second.Z : past.hi, newer ? second.z : past.lo, V(Functions<V>::log1p(e)));
  first = {first.decay + second.decay, sum.hi, sum.lo};
  return newer ? -part : part;
}

// ------------------------------------------------------------------------------------------------ adjoint

// Inside a chunk: lambda is dL/d(numerator) of a channel, and the sum of mu over a head's channels dL/d(denominator), both in
// the scale e^(m + c), which counts as a constant. A Share has every factor; there is no further exponential.
template <class V>
struct Adjoint {
  V lambda, mu;
};
// At a chunk's end, from dL/dmean and dL/dZ; dL/dZ may come with any one channel of the head, and 0 with the others.
template <class V>
MRU_INLINE Adjoint<V> open_adjoint(V d_mean, V d_Z, V mean, V q) {
  const V r = inverse(q);
  return {d_mean * r, (d_Z - d_mean * mean) * r};
}
// At a chunk's start: dL/dmean, and what summed over a head's channels is dL/dZ. q is 0 or 1 there.
template <class V>
MRU_INLINE V close_adjoint(const Adjoint<V>& adjoint, V mean, V q, V& d_mean) {
  d_mean = adjoint.lambda * q;
  return (adjoint.lambda * mean + adjoint.mu) * q;
}

// Adds what y's gradient g gives to the past: `part` gr = a r g of `read`. Callers have r in either factor. Without a bonus y is
// read after the update, and a is 1.
template <class V>
MRU_INLINE void add_read(Adjoint<V>& adjoint, V part, V gr, V y) {
  adjoint.lambda = Functions<V>::multiply_add(part, gr, adjoint.lambda);
  adjoint.mu = Functions<V>::multiply_add(-part, gr * y, adjoint.mu);
}
// Summed over a head's channels and times share.b this is the gradient of the score of an update, from the adjoint behind it.
// With the mean before the update instead of v, and times share.a q, it is the gradient of the decay.
template <class V>
MRU_INLINE V of_score(const Adjoint<V>& adjoint, V v) {
  return Functions<V>::multiply_add(adjoint.lambda, v, adjoint.mu);
}
// Summed over a head's channels and times b of `read` this is what y gives to the score and to the bonus; times b r if gr is g.
template <class V>
MRU_INLINE V of_bonus(V gr, V v, V y) {
  return gr * (v - y);
}
// Takes the adjoint through an update, to the state before it. `share.b` times its lambda before is the gradient of v.
template <class V>
MRU_INLINE void pass(Adjoint<V>& adjoint, V a) {
  adjoint.lambda *= a;
  adjoint.mu *= a;
}

// The factor that a segment's steps put on dL/dmean, from the log weights at its start and its end and its decays.
template <class V>
MRU_INLINE V adjoint_factor(Pair<V> start, Pair<V> end, V decay) {
  const V exponent = ((start.hi - end.hi) + decay) + (start.lo - end.lo);
  const V limited = exponent > zero<V>() ? zero<V>() : exponent;
  return start.hi == splat<V>(-kInfinity<V>) ? zero<V>() : Functions<V>::exp_of_minus_abs(limited);
}

}  // namespace mru::softmax
