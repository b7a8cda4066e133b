// Launches of the kernels of every cell for one element type: compiled once per row of `Element`, with
// -DMRU_ELEMENT=float32 and so on. The build makes cells.h (csrc/cells.py).
#include "backward.cuh"
#include "cells.h"
#include "forward.cuh"
#include "launch.cuh"
#include "segments.cuh"

namespace mru::cuda {
namespace {

struct Element {
  using float32 = float;
  using float64 = double;
  using bfloat16 = BFloat16;
  using float16 = Float16;
  using complex64 = Complex<float>;
  using complex128 = Complex<double>;
};
using T = Element::MRU_ELEMENT;
// Channels of a thread: 16 bytes of a stream, but not more than 32 of states.
template <class C>
constexpr int kVectorWidth = std::min<int>(16 / sizeof(T), 32 / sizeof(typename C::template State<T>));

// One call of an op: its launches, in order.
template <class F>
class Op {
  using S = typename F::S;

 public:
  Op(const Scan& scan, bool backward, void* workspace, void* stream)
      : scan_(scan),
        plan_(scan, backward),
        cell_(scan.scalars),
        checks_(plan_.is_cut() && (backward || !overwrites())),
        work_(layout(static_cast<char*>(workspace))),
        launch_(stream) {}

  const char* forward();
  const char* backward();
  const char* map(S* factor, S* offset);

 private:
  static constexpr bool kComposes = F::Cell::kComposes;
  // Registers bear 16 bytes of states in `backward`.
  using Narrow = typename F::template With<std::min<int>(F::W, 16 / sizeof(S))>;

  bool overwrites() const {
    if constexpr (F::Cell::kOverwrites) return cell_.overwrites();
    else return false;
  }
  Workspace<S> layout(char* base) const {
    const auto states = [&](int k) { return reinterpret_cast<S*>(base + k * plan_.states_bytes); };
    Workspace<S> work{};
    work.factor = states(0), work.offset = states(1), work.entry = states(3);
    if (checks_ && !overwrites()) work.late = reinterpret_cast<typename RealOf<S>::type*>(states(2));
    if (checks_) work.exit = states(4), work.again = reinterpret_cast<int*>(base + plan_.flag_offset());
    work.sums = reinterpret_cast<S*>(base + plan_.sums_offset());
    if (scan_.resets) work.reset_bits = reinterpret_cast<uint32_t*>(base + plan_.resets_offset());
    work.reset_grad = reinterpret_cast<S*>(base + plan_.reset_grad_offset());
    work.overwrites = overwrites();
    return work;
  }

  void mark() {
    if (!scan_.resets) return;
    const int64_t warps = ceil_div(std::min<int64_t>(scan_.time, kResetGroup), kResetWord);
    launch_(mark_resets, scan_.batch * plan_.reset_groups, dim3(unsigned(warps * kResetWord)),
            kResetGroup / kResetWord * int64_t(sizeof(uint32_t)), scan_, work_.reset_bits, Divisor(plan_.reset_groups));
  }
  // Launches a kernel with a thread for each segment and W channels.
  void over_segments(void (*kernel)(Call<F>), int64_t shared = 0, Heads heads = Heads::kBegin) {
    const int64_t across = scan_.channels / F::W;
    launch_(kernel, ceil_div(plan_.segments * across, kSegmentThreads), dim3(kSegmentThreads), shared,
            Call<F>{scan_, plan_, work_, Divisor(across), cell_, heads});
  }
  void summarize_segments(Heads heads) {
    constexpr int64_t ahead = TilesAhead<F, kSegmentTile<F>>::bytes(kSegmentThreads);
    static_assert(ahead <= 99 << 10);  // what a block may have on every device from compute capability 8.0 on
    over_segments(summarize<F>, ahead, heads);
  }
  // Launches blocks of tiles for `rows` segments of `plan`. They return at once if *unless_zero is 0.
  template <class G, class Room>
  void over_tiles(void (*kernel)(Call<G>), int64_t rows, const Plan& plan, const Workspace<S>& work,
                  const int* unless_zero = nullptr) {
    const Tiling tiling(scan_, rows, kRowLanes<G>, G::W, kSteps<G>, launch_.most_shared(), Room::bytes);
    launch_(kernel, rows * tiling.across, dim3(tiling.lanes, tiling.groups), Room::bytes(tiling.lanes, tiling.groups),
            Call<G>{scan_, plan, work, Divisor(tiling.across), cell_, Heads::kBegin, unless_zero});
  }
  void forward_tiles(const Plan& plan, const int* unless_zero = nullptr) {
    over_tiles<F, typename ForwardAgent<F>::Room>(cuda::forward<F>, plan.segments, plan, work_, unless_zero);
  }
  void backward_tiles(const Plan& plan, const Workspace<S>& work, const int* unless_zero = nullptr) {
    over_tiles<Narrow, typename BackwardAgent<Narrow>::Room>(cuda::backward<Narrow>, plan.sum_rows, plan, work,
                                                             unless_zero);
  }

  void carry_over(int direction) {
    const int64_t runs = ceil_div(plan_.row_segments, kCarryRun<S>), turns = ceil_div(runs, kCarryGroups);
    const int64_t groups = ceil_div(runs, turns), run = ceil_div(plan_.row_segments, groups * turns);
    const int64_t maps = groups + ceil_div(groups, kCarryPart);
    launch_(carry<S>, scan_.batch * ceil_div(scan_.channels, kCarryLanes), dim3(kCarryLanes, groups),
            2 * maps * kCarryLanes * sizeof(S), work_, plan_.row_segments, int(run), scan_.channels, direction);
  }
  // Launches `check`, which sets work.again. Returns the plan of the uncut form.
  Plan check_segments(int direction) {
    launch_(check<S>, ceil_div(plan_.segments * scan_.channels, kCheckThreads), dim3(kCheckThreads), 0, work_, plan_,
            Divisor(scan_.channels), direction);
    Scan uncut = scan_;
    uncut.segment = 0;
    return Plan(uncut, direction < 0);
  }
  void clear(void* rows, int64_t count) { launch_.copy_rows(rows, nullptr, count * scan_.channels * sizeof(S)); }
  void forward_cut();
  void summarize_backward();
  void reduce_sums();

  const Scan& scan_;
  const Plan plan_;
  const typename F::Cell cell_;
  const bool checks_;  // whether `check` follows
  Workspace<S> work_;
  Launcher launch_;
};

template <class F>
const char* Op<F>::forward() {
  mark();
  if (scan_.offsets && scan_.checkpoints) clear(scan_.checkpoints, scan_.batch * scan_.checkpoint_rows);
  if (!kComposes || !plan_.is_cut()) {
    forward_tiles(plan_);
    return launch_.result();
  }
  if constexpr (kComposes) forward_cut();
  return launch_.result();
}

// Forward, with time cut.
template <class F>
void Op<F>::forward_cut() {
  if (scan_.offsets) launch_.copy_rows(scan_.final_state, scan_.initial, scan_.sequences * scan_.channels * sizeof(S));
  summarize_segments(Heads::kBegin);
  carry_over(1);
  if constexpr (F::Cell::kCodes) over_segments(expand<F>);
  else forward_tiles(plan_);
  if (checks_) forward_tiles(check_segments(1), work_.again);
}

// The maps of m of the segments.
template <class F>
void Op<F>::summarize_backward() {
  if constexpr (F::Cell::kAdjointSeesState) {
    // The factors are those of the states. `backward` from m = 0 gives the offsets; its other results are overwritten.
    work_.late = nullptr;
    summarize_segments(Heads::kEnd);
    clear(work_.entry, plan_.segments);
    Workspace<S> from_zero = work_;
    from_zero.exit = work_.offset;
    backward_tiles(plan_, from_zero);
  } else {
    over_segments(summarize_adjoint<F, F::Cell::kCodes>);
  }
}

template <class F>
const char* Op<F>::backward() {
  mark();
  if (plan_.is_cut()) {
    if (scan_.offsets) {
      launch_.copy_rows(scan_.grad_initial, scan_.grad_final, scan_.sequences * scan_.channels * sizeof(S));
      if (scan_.grad_reset_state) clear(scan_.grad_reset_state, scan_.sequences);
    }
    if constexpr (kComposes) summarize_backward();
    carry_over(-1);
  }
  backward_tiles(plan_, work_);
  if (checks_) {
    const Plan uncut = check_segments(-1);
    backward_tiles(uncut, work_, work_.again);
    if (scan_.grad_reset_state)
      launch_(reduce_taken<S>, ceil_div(scan_.sequences * scan_.channels, kComposeThreads), dim3(kComposeThreads), 0,
              work_, scan_, plan_, Divisor(scan_.channels), Divisor(scan_.segment));
  }
  reduce_sums();
  return launch_.result();
}

template <class F>
void Op<F>::reduce_sums() {
  int which = 0;
  for (void* const total : scan_.grad_channel)
    if (total)
      launch_(reduce<S>, ceil_div(scan_.channels, kLanes), dim3(kLanes, kGroups), kLanes * kGroups * sizeof(S), work_,
              plan_.sum_rows, plan_.uncut_sum_rows, plan_.sums, which++, scan_.channels, static_cast<S*>(total));
}

template <class F>
const char* Op<F>::map(typename F::S* factor, typename F::S* offset) {
  mark();
  work_.late = nullptr;
  if (!plan_.is_cut()) work_.factor = factor, work_.offset = offset;
  summarize_segments(Heads::kNone);
  if (plan_.is_cut())
    launch_(compose<S>, ceil_div(scan_.batch * scan_.channels, kComposeThreads), dim3(kComposeThreads), 0, work_,
            scan_.batch, plan_.row_segments, Divisor(scan_.channels), factor, offset);
  return launch_.result();
}

// Calls f<Form>() with the inputs that a call is given, and the width of a thread.
template <class C, class Each>
const char* with_form_and_width(const Scan& scan, Each each) {
  unsigned given = 0, per_channel = 0;
  for (int i = 0; i < kMaxInputs; ++i) {
    given |= unsigned(scan.in[i].stream.data || scan.in[i].channel) << i;
    per_channel |= unsigned(scan.in[i].channel != nullptr) << i;
  }
  return with_form<C>(given, per_channel, [&]<unsigned kGiven, unsigned kChannels>() {
    constexpr int kWidth = kVectorWidth<C>;
    if (moves_words(scan, kWidth)) return each.template operator()<Form<C, T, kWidth, kGiven, kChannels>>();
    return each.template operator()<Form<C, T, 1, kGiven, kChannels>>();
  });
}

template <class C>
const char* launch_forward(const Scan& scan, void* workspace, void* stream) {
  return with_form_and_width<C>(scan, [&]<class F>() { return Op<F>(scan, false, workspace, stream).forward(); });
}
template <class C>
const char* launch_backward(const Scan& scan, void* workspace, void* stream) {
  return with_form_and_width<C>(scan, [&]<class F>() { return Op<F>(scan, true, workspace, stream).backward(); });
}
template <class C>
const char* launch_map(const Scan& scan, void* factor, void* offset, void* workspace, void* stream) {
  return with_form_and_width<C>(scan, [&]<class F>() {
    using S = typename F::S;
    return Op<F>(scan, false, workspace, stream).map(static_cast<S*>(factor), static_cast<S*>(offset));
  });
}
template <class C>
constexpr Kernels kernels_of() {
  using S = typename C::template State<T>;
  if constexpr (RealOf<T>::is_complex && !C::kComplex) return {};
  else if constexpr (!C::template Cell<S, C::all()>::kComposes)
    return {&launch_forward<C>, &launch_backward<C>, nullptr};
  else return {&launch_forward<C>, &launch_backward<C>, &launch_map<C>};
}

}  // namespace

#define MRU_DEFINE(cell) \
  template <>            \
  const Kernels KernelsOf<cells::cell>::MRU_ELEMENT = kernels_of<cells::cell>();
MRU_EACH_CELL(MRU_DEFINE)

}  // namespace mru::cuda
