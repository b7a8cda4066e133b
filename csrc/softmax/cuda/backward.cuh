// `backward`: gradients of the streams, of the initial state and of the inputs [H]. `add_parts`: the sums over a head whose
// channels several parts have.
//
// A thread goes through the chunks of its segment from the last to the first. It copies the streams of a chunk to shared
// memory, where it reads only what it copied itself, and takes the chunk's steps to save the state before each tile. Then it
// takes the steps of a tile again, from the last tile to the first, keeps their factors in registers, and goes back.
#pragma once
#include "../../sum.h"
#include "threads.cuh"

namespace mru::softmax::cuda {

constexpr int kBackwardThreads = int(kWarp), kBackwardBlocks = 8;  // of a block; blocks of a multiprocessor, at least
constexpr int kAddThreads = 256;

// Shared memory of a block: of each thread, the streams of a chunk and the states before its tiles.
template <class F>
class Room {
 public:
  using T = typename F::T;
  using S = typename F::S;
  using Scores = Vector<T, F::kScores>;
  using Values = Vector<T, F::W>;
  static constexpr int kRows = F::W + 3 * F::kScores;  // of a state inside a chunk

  static int64_t bytes(const HeadScan& scan) {
    const int64_t tiles = scan.chunk / F::kTile, scores = scan.in[kDecay].stream.data ? 2 : 1;
    return kBackwardThreads *
           (tiles * kRows * int64_t(sizeof(S)) + scan.chunk * int64_t(sizeof(Values) + scores * sizeof(Scores)));
  }
  __device__ __forceinline__ explicit Room(int64_t chunk) : chunk_(int(chunk)), thread_(int(threadIdx.x)) {
    values_ = reinterpret_cast<Values*>(shared_memory());
    states_ = reinterpret_cast<S*>(values_ + chunk_ * kBackwardThreads);
    scores_ = reinterpret_cast<Scores*>(states_ + chunk_ / F::kTile * kRows * kBackwardThreads);
    decays_ = scores_ + chunk_ * kBackwardThreads;
  }

  __device__ __forceinline__ void copy(Lines<F> lines, int count) const {
    for (int t = 0; t < count; ++t, lines.advance()) {
      copy_ahead<Traffic::kStream>(&at(scores_, t), lines.score.at);
      copy_ahead<Traffic::kStream>(&at(values_, t), lines.value.at);
      if (lines.has_decay) copy_ahead<Traffic::kStream>(&at(decays_, t), lines.decay.at);
    }
    commit_copies();
    wait_for_copies<0>();
  }
  __device__ __forceinline__ Inputs<F> inputs(int t, bool has_decay) const {
    Inputs<F> inputs;
    inputs.score = at(scores_, t), inputs.value = at(values_, t);
    if (has_decay) inputs.decay = at(decays_, t);
    return inputs;
  }
  __device__ __forceinline__ void save(int tile, const Inner<F>& inner) const {
    each(tile, inner, [](S& room, const S& x) { room = x; });
  }
  __device__ __forceinline__ Inner<F> saved(int tile) const {
    Inner<F> inner;
    each(tile, inner, [](const S& room, S& x) { x = room; });
    return inner;
  }

 private:
  template <class V>
  __device__ __forceinline__ V& at(V* rows, int row) const {
    return rows[row * kBackwardThreads + thread_];
  }
  template <class Values, class Move>
  __device__ __forceinline__ void each(int tile, Values& inner, Move move) const {
    int row = tile * kRows;
#pragma unroll
    for (int w = 0; w < F::W; ++w) move(at(states_, row++), inner.mean[w]);
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) {
      move(at(states_, row++), inner.weight[h].q);
      move(at(states_, row++), inner.weight[h].m);
      move(at(states_, row++), inner.weight[h].c);
    }
  }

  const int chunk_, thread_;
  Values* values_;
  S* states_;
  Scores* scores_;
  Scores* decays_;
};

// dL/dstate at a border, of each channel of a thread. The sum of d_Z over a head's channels is dL/dZ.
template <class F>
struct Gradient {
  typename F::S d_mean[F::W], d_Z[F::W];
};
// A sum over a thread's channels of each of its heads.
template <class F>
using HeadSums = Vector<typename F::S, F::kScores>;

// The gradient of a stream [B, T, H]: stored where one part has all channels of a head; else `add_parts` adds up the parts.
template <class F>
class HeadGradient {
  using T = typename F::T;
  using S = typename F::S;

 public:
  // place: of [parts, B T, H] in the workspace
  __device__ __forceinline__ HeadGradient(const Call<F>& call, const Place<F>& place, const Range& range,
                                          const Stream& stream, int64_t at, int64_t position)
      : is_whole_(call.plan.parts == 1), stores_(stream.data && place.leads_part() && !call.from_zero) {
    if (!stores_) return;
    const HeadScan& scan = call.scan;
    if (is_whole_) {
      whole_ = Line<T>(scan, stream, range.row, position, place.head, -1);
    } else {
      S* const part = call.work(at) + place.part * scan.batch * scan.time * scan.heads;
      part_ = Line<S>(scan, {part, scan.time * scan.heads, scan.heads}, range.row, position, place.head, -1);
    }
  }
  __device__ __forceinline__ void next(const HeadSums<F>& sums) {
    if (!stores_) return;
    if (is_whole_) store<Traffic::kStream>(whole_.at, narrow<T>(sums)), whole_.advance();
    else store<Traffic::kState>(part_.at, sums), part_.advance();
  }

 private:
  const bool is_whole_, stores_;
  Line<T> whole_;
  Line<S> part_;
};

template <class F>
class BackwardAgent {
  using T = typename F::T;
  using S = typename F::S;

 public:
  __device__ __forceinline__ BackwardAgent(const Call<F>& call, const Place<F>& place)
      : call_(call),
        scan_(call.scan),
        place_(place),
        range_(call, place.segment),
        heads_(call.scan, place),
        room_(call.scan.chunk),
        of_score_(call, place, range_, scan_.grad_in[kScore], call.plan.of_score, range_.end - 1),
        of_decay_(call, place, range_, scan_.grad_in[kDecay], call.plan.of_decay, range_.end - 1),
        of_value_(scan_, scan_.grad_in[kValue], range_.row, range_.end - 1, place.channel, -1) {}

  __device__ __forceinline__ void run() {
    Gradient<F> gradient = entering();
    for (int64_t end = range_.end; end > range_.begin;) {
      const int64_t begin = range_.start + call_.plan.chunk_divisor(end - 1 - range_.start) * scan_.chunk;
      take_chunk(begin, int(end - begin), gradient);
      end = begin;
    }
    if (call_.from_zero) summarize(gradient);
    else leave(gradient);
  }

 private:
  // dL/dstate at the segment's right.
  __device__ __forceinline__ Gradient<F> entering() const {
    Gradient<F> gradient{};
    if (range_.last) {
      const State<F> given(call_, place_, scan_.grad_final, range_.sequence);
#pragma unroll
      for (int w = 0; w < F::W; ++w) {
        const int h = F::head(w);
        gradient.d_mean[w] = given.mean[w];
        if (place_.leads() && w == h) gradient.d_Z[w] = given.Z[h];
      }
    } else if (!call_.from_zero) {
      const int64_t at = place_.segment * scan_.channels + place_.channel;
#pragma unroll
      for (int w = 0; w < F::W; ++w) {
        gradient.d_mean[w] = load<Traffic::kState, 1>(call_.work(call_.plan.first) + at + w).at[0];
        gradient.d_Z[w] = load<Traffic::kState, 1>(call_.work(call_.plan.second) + at + w).at[0];
      }
    }
    return gradient;
  }

  __device__ __forceinline__ Inputs<F> inputs(int t) const { return room_.inputs(t, heads_.decay_is_stream); }

  __device__ __forceinline__ void take_chunk(int64_t begin, int count, Gradient<F>& gradient) {
    room_.copy(Lines<F>(scan_, place_, range_.row, begin), count);
    const bool enters = begin == range_.start;
    const State<F> border(call_, place_, enters ? scan_.initial : scan_.checkpoints,
                          enters ? range_.sequence : border_row(call_, range_.row, begin));
    const Inner<F> start(border);
    const int tiles = (count + F::kTile - 1) / F::kTile;
    Inner<F> inner = start;
    for (int tile = 0; tile < tiles - 1; ++tile) {
      room_.save(tile, inner);
#pragma unroll
      for (int t = 0; t < F::kTile; ++t) take_step(inner, inputs(tile * F::kTile + t), heads_);
    }
    room_.save(tiles - 1, inner);
    Adjoint<S> adjoint[F::W];
    for (int tile = tiles - 1; tile >= 0; --tile) {
      const int first = tile * F::kTile, left = count - first;
      take_tile(begin, first, left < F::kTile ? left : F::kTile, tile == tiles - 1, gradient, adjoint);
    }
#pragma unroll
    for (int w = 0; w < F::W; ++w)
      gradient.d_Z[w] = close_adjoint(adjoint[w], start.mean[w], start.weight[F::head(w)].q, gradient.d_mean[w]);
  }

  // Goes back through steps [first, first + count) of the chunk that begins at `begin`. If they are its last, the adjoint
  // comes from the gradient at its border.
  __device__ __forceinline__ void take_tile(int64_t begin, int first, int count, bool are_last,
                                            const Gradient<F>& gradient, Adjoint<S> (&adjoint)[F::W]) {
    Vector<T, F::W> grad_y[F::kTile];
    Line<const T> of_y(scan_, scan_.grad_h, range_.row, begin + first, place_.channel);
#pragma unroll
    for (int t = 0; t < F::kTile; ++t)
      if (t < count) grad_y[t] = load<Traffic::kStream, F::W>(of_y.at), of_y.advance();
    Inner<F> before[F::kTile + 1];
    Shares<F> shares[F::kTile];
    before[0] = room_.saved(first / F::kTile);
#pragma unroll
    for (int t = 0; t < F::kTile; ++t) {
      before[t + 1] = before[t];
      if (t < count) shares[t] = take_step(before[t + 1], inputs(first + t), heads_);
    }
    if (are_last) {
      const Inner<F>& end = before[F::kTile];
#pragma unroll
      for (int w = 0; w < F::W; ++w)
        adjoint[w] = open_adjoint(gradient.d_mean[w], gradient.d_Z[w], end.mean[w], end.weight[F::head(w)].q);
    }
    HeadSums<F> decay_sum{}, bonus_sum{};
#pragma unroll
    for (int t = F::kTile - 1; t >= 0; --t)
      if (t < count)
        back(before[t], before[t + 1], shares[t], inputs(first + t), grad_y[t], adjoint, decay_sum, bonus_sum);
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) {
      decay_total_[h].add(decay_sum.at[h]);
      if constexpr (F::kBonus) bonus_total_[h].add(bonus_sum.at[h]);
    }
  }

  // Goes back through one step.
  __device__ __forceinline__ void back(const Inner<F>& before, const Inner<F>& after, const Shares<F>& shares,
                                       const Inputs<F>& inputs, const Vector<T, F::W>& grad_y,
                                       Adjoint<S> (&adjoint)[F::W], HeadSums<F>& decay_sum, HeadSums<F>& bonus_sum) {
    HeadSums<F> at_update{}, past{}, at_read{};
    Vector<S, F::W> of_value;
#pragma unroll
    for (int w = 0; w < F::W; ++w) {
      const int h = F::head(w);
      const S v = widen(inputs.value, w), g = widen(grad_y, w);
      const Share<S>& update = shares.update[h];
      if constexpr (!F::kBonus) add_read(adjoint[w], S(1), g * update.r, after.mean[w]);
      at_update.at[h] += of_score(adjoint[w], v);
      past.at[h] += of_score(adjoint[w], before.mean[w]);
      of_value.at[w] = update.b * adjoint[w].lambda;
      pass(adjoint[w], update.a);
      if constexpr (F::kBonus) {
        const Share<S>& read = shares.read[h];
        const S gr = g * read.r, y = mix(read.k, before.mean[w], v);
        at_read.at[h] += of_bonus(gr, v, y);
        of_value.at[w] += read.b * gr;
        add_read(adjoint[w], read.a, gr, y);
      }
    }
    HeadSums<F> of_score, of_decay;
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) {
      of_score.at[h] = shares.update[h].b * at_update.at[h];
      of_decay.at[h] = shares.update[h].a * before.weight[h].q * past.at[h];
      if constexpr (F::kBonus) {
        const S own = shares.read[h].b * at_read.at[h];
        of_score.at[h] += own;
        bonus_sum.at[h] += own;
      }
      decay_sum.at[h] += of_decay.at[h];
      decays_[h] += heads_.decay_of(inputs, h);
    }
    if (call_.from_zero) return;
    store_step(of_score, of_decay, of_value);
  }
  __device__ __forceinline__ void store_step(HeadSums<F> of_score, HeadSums<F> of_decay,
                                             const Vector<S, F::W>& of_value) {
    if (place_.inside) store<Traffic::kStream>(of_value_.at, narrow<T>(of_value));
    of_value_.advance();
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) of_score.at[h] = sum_of_part(call_.plan, place_, of_score.at[h]);
    of_score_.next(of_score);
    if (!heads_.decay_is_stream) return;
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) of_decay.at[h] = sum_of_part(call_.plan, place_, of_decay.at[h]);
    of_decay_.next(of_decay);
  }

  __device__ __forceinline__ static void put(S* at, S x) { store<Traffic::kState>(at, Vector<S, 1>{{x}}); }

  // Plan::first, Plan::second and Plan::decays of the segment.
  __device__ __forceinline__ void summarize(const Gradient<F>& gradient) const {
    if (!place_.inside) return;
    const int64_t at = place_.segment * scan_.channels + place_.channel;
#pragma unroll
    for (int w = 0; w < F::W; ++w) {
      put(call_.work(call_.plan.first) + at + w, gradient.d_mean[w]);
      put(call_.work(call_.plan.second) + at + w, gradient.d_Z[w]);
    }
    if (place_.leads())
#pragma unroll
      for (int h = 0; h < F::kScores; ++h)
        put(call_.work(call_.plan.decays) + place_.segment * scan_.heads + place_.head + h, decays_[h]);
  }
  // The gradients of the initial state and of the inputs [H].
  __device__ __forceinline__ void leave(const Gradient<F>& gradient) const {
    const Plan& plan = call_.plan;
    if (range_.first) {
      State<F> initial;
#pragma unroll
      for (int h = 0; h < F::kScores; ++h) initial.Z[h] = 0;
#pragma unroll
      for (int w = 0; w < F::W; ++w) {
        initial.mean[w] = gradient.d_mean[w];
        initial.Z[F::head(w)] += gradient.d_Z[w];
      }
#pragma unroll
      for (int h = 0; h < F::kScores; ++h) initial.z[h] = initial.Z[h] = sum_of_part(plan, place_, initial.Z[h]);
      initial.save(call_, place_, scan_.grad_initial, range_.sequence);
      if (plan.parts > 1 && place_.leads_part())
        put(call_.work(plan.of_initial) + (place_.part * scan_.sequences + range_.sequence) * scan_.heads + place_.head,
            initial.Z[0]);
    }
    int which = 0;
    if (scan_.in[kDecay].channel) store_sum(decay_total_, which++);
    if constexpr (F::kBonus) store_sum(bonus_total_, which);
  }
  __device__ __forceinline__ void store_sum(const Sum<S> (&totals)[F::kScores], int which) const {
    const Plan& plan = call_.plan;
    const int64_t row = place_.segment * plan.parts + place_.part;
    S* const at = call_.work(plan.sums_at) + (row * plan.sums + which) * scan_.heads + place_.head;
#pragma unroll
    for (int h = 0; h < F::kScores; ++h) {
      const S total = sum_of_part(plan, place_, totals[h].total());
      if (place_.leads_part()) put(at + h, total);
    }
  }

  const Call<F>& call_;
  const HeadScan& scan_;
  const Place<F>& place_;
  const Range range_;
  const HeadInputs<F> heads_;
  const Room<F> room_;
  HeadGradient<F> of_score_, of_decay_;
  Line<T> of_value_;
  Sum<S> decay_total_[F::kScores], bonus_total_[F::kScores];
  S decays_[F::kScores] = {};  // the sum of the decays
};

template <class F>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks) backward(const __grid_constant__ Call<F> call) {
  const Place<F> place(call);
  if (F::kHeads ? place.segment >= call.plan.segments : !place.inside) return;
  BackwardAgent<F>(call, place).run();
}

// Adds up the parts of a head, [parts, rows, H], in their order: rows are steps, and the sums go to `stream`; or sequences, and
// they go to the gradient of the initial state. A thread for a row and a head.
template <class F>
__global__ void __launch_bounds__(kAddThreads)
    add_parts(const __grid_constant__ Call<F> call, int64_t place, int64_t rows, Stream stream, Divisor by_heads,
              Divisor by_time) {
  using S = typename F::S;
  const HeadScan& scan = call.scan;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = by_heads(thread);
  if (row >= rows) return;
  const int64_t head = thread - row * scan.heads;
  S sum = 0;
  for (int64_t part = 0; part < call.plan.parts; ++part)
    sum += load<Traffic::kState, 1>(call.work(place) + part * rows * scan.heads + thread).at[0];
  if (stream.data) {
    const int64_t batch = by_time(row), time = row - batch * scan.time;
    typename F::T* const to =
        static_cast<typename F::T*>(stream.data) + batch * stream.batch + time * stream.time + head;
    store<Traffic::kStream>(to, narrow<typename F::T>(Vector<S, 1>{{sum}}));
  } else {
    S* const to = static_cast<S*>(scan.grad_initial) + row * call.plan.columns + scan.channels + head;
    store<Traffic::kState>(to, Vector<S, 1>{{sum}});
    store<Traffic::kState>(to + scan.heads, Vector<S, 1>{{sum}});
  }
}

}  // namespace mru::softmax::cuda
