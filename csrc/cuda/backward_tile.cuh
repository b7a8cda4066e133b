// A tile of `backward`: maps of the threads' steps, states, gradients and their sums.
#pragma once
#include "tiles.cuh"

namespace mru::cuda {

// Rows of the shared maps: the factor of m, the offset of s, the offset of m and, if it is another, the factor of s.
template <class F>
constexpr int kBackwardMaps = RealOf<typename F::S>::is_complex ? 4 : 3;
// After the maps, for each sum over time: the sum and what it has lost (sum.h).
template <class F>
using BackwardBase = TileAgent<F, F::kStreams + 1, kBackwardMaps<F> + 2 * F::kSums, 5>;

template <class F>
class BackwardAgent;  // backward.cuh

// One tile. kSelects: every write overwrites the state, so that states are selected and not computed.
template <class F, bool kSelects, class Part>
class BackwardTile {
  using S = typename F::S;
  using Cell = typename F::Cell;
  using States = typename F::States;
  using Elements = Vector<typename F::T, F::W>;
  using Of = Selection<F>;
  using Agent = BackwardAgent<F>;
  static constexpr bool kSeesState = Cell::kAdjointSeesState;
  static constexpr bool kComplex = RealOf<S>::is_complex;
  static constexpr int kGrad = Agent::kGrad, kFactor = kComplex ? 3 : 0;  // kFactor: row of the factor of s

 public:
  __device__ __forceinline__ BackwardTile(Agent& agent, const Part& part, const Cell& cell)
      : agent_(agent), room_(agent.room), part_(part), cell_(cell) {}

  __device__ __forceinline__ void run() {
    if constexpr (kSelects) reduce_selecting();
    else reduce();
    __syncthreads();
    walk_channels();
    __syncthreads();
    if constexpr (kSeesState) {
      recompute();
      reduce_adjoint();
      __syncthreads();
      agent_.for_block([&](int c, int64_t d) { walk_adjoint(c, d); });
      __syncthreads();
    }
    if (!agent_.inside) return;
    if constexpr (kSelects) entry_ = room_.own(1);
    else if constexpr (!kSeesState) recompute();
    differentiate();
  }

 private:
  // The maps of the thread's steps to shared memory: of s; of m too, unless it needs the states.
  __device__ __forceinline__ void reduce() {
    if constexpr (!Cell::kComposes) return;
    States a = all<F>(1), u = all<F>(0), m = all<F>(0);
#pragma unroll
    for (int t = 0; t < kSteps<F>; ++t)
      if (part_.has(t)) {
        [[maybe_unused]] const Elements grad = room_.staged(part_.tile, kGrad, t);
        agent_.for_channels(part_.tile, t, [&](int w, const S* x) {
          u.at[w] = cell_.recompute(x, u.at[w]);
          a.at[w] = pull_at(cell_, x, S(0), a.at[w]);
          if constexpr (!kSeesState) {
            const S of_grad = cell_.cotangent(x, S(0), S(0), S(widen(grad, w)), S(0));
            m.at[w] = Affine<S>{a.at[w], m.at[w]}.apply_finite(of_grad);  // what reaches the left end
          }
        });
      }
    share(a, u, m);
  }
  __device__ __forceinline__ void reduce_selecting() {
    using V = typename Of::V;
    States a = all<F>(1), u = all<F>(0), m = all<F>(0);
    typename Of::Mask written[F::W / kElements<V>] = {};
    states_[0] = Of::none();
#pragma unroll
    for (int t = 0; t < kSteps<F>; ++t) {
      const auto grad = Of::values(room_.staged(part_.tile, kGrad, t));
      agent_.template for_values<V>(part_.tile, t, [&](int i, const V* x) {
        states_[t + 1].at[i] = Of::last(cell_, x, states_[t].at[i]);
        written[i] = written[i] | cell_.writes(x);
        const V held = select(written[i], splat<V>(0), grad.at[i]);  // what reaches the left end of it
#pragma unroll
        for (int j = 0; j < kElements<V>; ++j) {
          const int w = i * kElements<V> + j;
          m.at[w] = selected_cotangent(x, w, lane(held, j), m.at[w]);
        }
      });
    }
    Of::as_map(states_[kSteps<F>], a, u);
    share(a, u, m);
  }
  // `cotangent` at channel w. That of a pair reads inputs per channel only.
  __device__ __forceinline__ S selected_cotangent(const S* x, int, S g, S m) const {
    return cell_.cotangent(x, S(0), S(0), g, m);
  }
  __device__ __forceinline__ S selected_cotangent(const Pair<typename F::T>*, int w, S g, S m) const {
    S x[F::kInputs];
    agent_.channel.at(w, x);
    return cell_.cotangent(x, S(0), S(0), g, m);
  }
  __device__ __forceinline__ void share(const States& a, const States& u, const States& m) const {
    room_.own(0) = a, room_.own(1) = u;
    if constexpr (!kSeesState) room_.own(2) = joined(m);
    if constexpr (kComplex) room_.own(kFactor) = conj_all<F>(a);
  }
  // m at the left end of the thread's steps with the gradient of a boundary there. That at the span's begin joins in the
  // span on its left.
  __device__ __forceinline__ bool has_boundary(int64_t position) const {
    return position > agent_.span.begin && joins(agent_.call.scan, agent_.call.plan, agent_.span, position);
  }
  __device__ __forceinline__ States joined(const States& m) const {
    if (!agent_.inside || !part_.has(0) || !has_boundary(part_.position)) return m;
    return add<F>(m, boundary_grad<F>(agent_.call.scan, agent_.call.plan, agent_.span, part_.position, agent_.d));
  }
  // The offsets of the maps of m, from the states. Their factors are in shared memory already, if these need no state.
  __device__ __forceinline__ void reduce_adjoint() const {
    States a = all<F>(1), m = all<F>(0);
#pragma unroll
    for (int t = 0; t < kSteps<F>; ++t)
      if (part_.has(t)) {
        const Elements grad = room_.staged(part_.tile, kGrad, t);
        agent_.for_channels(part_.tile, t, [&](int w, const S* x) {
          const S of_grad = cell_.cotangent(x, states_[t].at[w], states_[t + 1].at[w], S(widen(grad, w)), S(0));
          a.at[w] = pull_at(cell_, x, states_[t].at[w], a.at[w]);
          m.at[w] = Affine<S>{a.at[w], m.at[w]}.apply_finite(of_grad);
        });
      }
    if constexpr (!Cell::kComposes) room_.own(0) = a;
    room_.own(2) = joined(m);
  }

  // Offsets of the groups become what enters them: the states by some threads, m by others.
  __device__ __forceinline__ void walk_channels() const {
    for (int i = room_.thread; i < (kSeesState ? 1 : 2) * room_.channels; i += room_.threads) {
      const int c = i < room_.channels ? i : i - room_.channels;
      if (agent_.first + c >= agent_.call.scan.channels) continue;
      if (i < room_.channels) walk_states(c, agent_.first + c);
      else if constexpr (!kSeesState) walk_adjoint(c, agent_.first + c);
    }
  }
  __device__ __forceinline__ Column<F, BackwardBase<F>> column(int c, int64_t d) const {
    return {agent_, part_.tile, part_.begin, c, d};
  }
  __device__ __forceinline__ void walk_states(int c, int64_t d) const {
    S *const factors = room_.row(kFactor) + c, *const values = room_.row(1) + c;
    const S start = room_.start(part_.tile, c);
    if constexpr (kSelects) {
      walk(factors, values, room_.channels, int(blockDim.y), start);
    } else {
      const auto scan = [&](S s) {
        return column(c, d).scan_steps(room_.row(1), 1, s, [&](int, const S* x, S s) { return cell_.recompute(x, s); });
      };
      if constexpr (!Cell::kComposes) scan(start);
      else walk_or_scan<false>(factors, values, room_.channels, int(blockDim.y), start, scan);
    }
  }
  __device__ __forceinline__ void walk_adjoint(int c, int64_t d) const {
    const int groups = int(blockDim.y), last = c + (groups - 1) * room_.channels;
    S& carried = room_.carried(c);
    carried =
        walk_or_scan<kSelects>(room_.row(0) + last, room_.row(2) + last, -room_.channels, groups, carried, [&](S m) {
          const auto of = column(c, d);
          return of.scan_steps(room_.row(2), -1, m, [&](int step, const S* x, S m) {
            S before = 0, after = 0;
            if constexpr (kSeesState) states_at(of, step, before, after);
            const S left = pull_at(cell_, x, before, cell_.cotangent(x, before, after, of.element(step, kGrad), m));
            const int64_t position = part_.begin + step;
            if (!has_boundary(position)) return left;
            const auto& call = agent_.call;
            return left + boundary_grad<typename F::Single>(call.scan, call.plan, agent_.span, position, d).at[0];
          });
        });
  }
  // The states before and after a step of the tile at the channel of `of`, from that which enters its group.
  template <class Of>
  __device__ __forceinline__ void states_at(const Of& of, int step, S& before, S& after) const {
    const int group = step / kSteps<F>;
    after = room_.row(1)[group * room_.channels + of.channel];
    S x[F::kInputs];
    of.channel_inputs(x);
    for (int i = group * kSteps<F>; i <= step; ++i) {
      before = after;
      if (!of.has(i)) continue;
      of.inputs(i, x);
      after = cell_.recompute(x, before);
    }
  }

  // The states before each of the thread's steps and after the last.
  __device__ __forceinline__ void recompute() {
    states_[0] = room_.own(1);
#pragma unroll
    for (int t = 0; t < kSteps<F>; ++t) {
      states_[t + 1] = states_[t];
      if (part_.has(t))
        agent_.for_channels(part_.tile, t,
                            [&](int w, const S* x) { states_[t + 1].at[w] = cell_.recompute(x, states_[t].at[w]); });
    }
  }
  __device__ __forceinline__ S state(int t, int w) const {
    if constexpr (!kSelects) return states_[t].at[w];
    else return is_nan(Of::at(states_[t], w)) ? entry_.at[w] : Of::at(states_[t], w);
  }

  // The gradients of the thread's steps, and their sums over time.
  __device__ __forceinline__ void differentiate() const {
    const Scan& scan = agent_.call.scan;
    States m = room_.own(2);
    typename F::T* into[F::kStreams];
    int64_t stride[F::kStreams];
    for_streams<F>([&](int i, int k) {
      const Row<typename F::T> row(scan, scan.grad_in[i], agent_.span.row(scan), agent_.d);
      into[k] = row.at(part_.position + kSteps<F> - 1), stride[k] = -row.step;
    });
#pragma unroll
    for (int t = kSteps<F> - 1; t >= 0; --t) {
      if (part_.has(t)) {
        States gradients[F::kInputs];
        const Elements grad = room_.staged(part_.tile, kGrad, t);
        agent_.for_channels(part_.tile, t, [&](int w, const S* x) {
          S dx[F::kInputs];
          const S after = state(t + 1, w), g = widen(grad, w);
          m.at[w] = cell_.vjp(x, state(t, w), after, g, m.at[w], dx);
          int of_channel = 0;
#pragma unroll
          for (int i = 0; i < F::kInputs; ++i) {
            if (F::is_stream(i)) gradients[i].at[w] = dx[i];
            if (!F::is_per_channel(i)) continue;
            S& sum = agent_.sums_[of_channel++].at[w];
            if (i == Cell::kAlpha) sum = multiply_add(g, after, sum);  // dx[i] is g after: one instruction for both
            else sum += dx[i];
          }
        });
        for_streams<F>([&](int i, int k) { store<Traffic::kStream>(into[k], narrow<typename F::T>(gradients[i])); });
      }
      for_streams<F>([&](int, int k) { into[k] = advance(into[k], stride[k]); });
    }
  }

  Agent& agent_;
  const typename Agent::Room& room_;
  const Part& part_;
  const Cell& cell_;
  // Before each step and after the last: the states or, where they are selected, what the thread's own steps wrote.
  std::conditional_t<kSelects, typename Of::Values, States> states_[kSteps<F> + 1];
  States entry_;  // kSelects: the state that enters the thread's steps
};

}  // namespace mru::cuda
