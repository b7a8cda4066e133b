// Launches of the kernels for one element type: compiled once per row of `Element`, with -DMRU_ELEMENT=float32 and so on.
#include "../cells/bmru.h"
#include "../cells/linear.h"
#include "../cells/schmitt.h"
#include "tiles.cuh"

namespace mru::cuda {
namespace {

struct Element {
  using float32 = float;
  using float64 = double;
  using bfloat16 = BFloat16Bits;
  using float16 = Float16Bits;
  using complex64 = Complex<float>;
  using complex128 = Complex<double>;
};
using T = Element::MRU_ELEMENT;
using S = StateOf<T>::type;
constexpr int kVectorWidth = 16 / sizeof(T);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The one way to launch. Keeps the first error; after one, nothing more is launched.
class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {
    int device = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&most_shared_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  }
  int64_t most_shared() const { return most_shared_; }  // bytes that a block may have

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), int64_t blocks, dim3 threads, int64_t shared, const A&... arguments) {
    if (blocks == 0) return;
    if (blocks > INT32_MAX) check(cudaErrorInvalidValue);
    if (shared > kDefaultShared)
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared)));
    if (error_ != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, arguments...));
    check(cudaGetLastError());
  }
  // What a sequence without a step leaves: rows [sequences, D] as they were given, or zeros.
  void copy_rows(void* to, const void* from, int64_t bytes) {
    if (bytes == 0 || error_ != cudaSuccess) return;
    check(from ? cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_)
               : cudaMemsetAsync(to, 0, bytes, stream_));
  }
  const char* result() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

 private:
  static constexpr int64_t kDefaultShared = 48 << 10;
  void check(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
  int most_shared_ = 0;
};

// One call of an op: its launches, in order.
struct Run {
  const Scan& scan;
  const Plan plan;
  const bool forgets, checks;  // whether a write forgets the state; whether `check` follows
  const Workspace<S> work;
  Launcher launch;

  Run(const Scan& scan, bool backward, void* workspace, void* stream)
      : scan(scan),
        plan(scan, backward),
        forgets(scan.epsilon == 0 && scan.cell != CellKind::kLinear),
        checks(plan.chunked() && (backward || !forgets)),
        work(cut(static_cast<char*>(workspace))),
        launch(stream) {}

  Workspace<S> cut(char* base) const {
    const auto states = [&](int k) { return reinterpret_cast<S*>(base + k * plan.states_bytes); };
    return {states(0),
            states(1),
            reinterpret_cast<typename RealOf<S>::type*>(states(2)),
            states(3),
            checks ? states(4) : nullptr,
            checks ? reinterpret_cast<int*>(base + plan.flag_offset()) : nullptr,
            reinterpret_cast<S*>(base + plan.sums_offset()),
            forgets};
  }
  Call<S> call_over(const Plan& plan, int64_t across, const int* unless_zero = nullptr) const {
    return {scan, plan, work, Divisor(across), Surrogate<RealOf<S>::type>(scan.surrogate_scale), unless_zero};
  }
  // A thread for each of `rows` jobs and W channels.
  template <class F>
  void over_channels(void (*kernel)(Call<S>), int64_t rows, int threads, int64_t shared = 0) {
    const int64_t across = scan.channels / F::W;
    launch(kernel, ceil_div(rows * across, threads), dim3(threads), shared, call_over(plan, across));
  }
  // Launches blocks of tiles for `rows` jobs of `plan`. The blocks return at once if *unless_zero is 0.
  template <class F, class Room>
  void over_tiles(void (*kernel)(Call<S>), int64_t rows, const Plan& plan, const int* unless_zero = nullptr) {
    const Tiling tiling(scan, rows, kRowLanes<F>, F::W, kSteps<F>, launch.most_shared(), Room::bytes);
    launch(kernel, rows * tiling.across, dim3(tiling.lanes, tiling.groups), Room::bytes(tiling.lanes, tiling.groups),
           call_over(plan, tiling.across, unless_zero));
  }
  // Launches `check`, which sets work.again. Returns the plan of the wide form.
  Plan check_jobs(int direction) {
    launch(check<S>, ceil_div(plan.jobs * scan.channels, kCheckThreads), dim3(kCheckThreads), 0,
           call_over(plan, scan.channels), direction);
    Scan whole = scan;
    whole.segment = 0;
    return Plan(whole, direction < 0);
  }
  void carry_over(int direction) {
    const int64_t runs = ceil_div(plan.segments, kCarryRun<S>), turns = ceil_div(runs, kCarryGroups);
    const int64_t groups = ceil_div(runs, turns), run = ceil_div(plan.segments, groups * turns);
    const int64_t maps = groups + ceil_div(groups, kCarryPart);
    launch(carry<S>, scan.batch * ceil_div(scan.channels, kCarryLanes), dim3(kCarryLanes, groups),
           2 * maps * kCarryLanes * sizeof(S), work, plan.segments, int(run), scan.channels, direction);
  }
};

template <class F>
void run_forward(Run& run) {
  const Scan& scan = run.scan;
  const auto from_streams = [&](const Plan& plan, const int* unless_zero = nullptr) {
    run.over_tiles<F, ForwardRoom<F>>(forward<F>, plan.jobs, plan, unless_zero);
  };
  if (!run.plan.chunked()) return from_streams(run.plan);
  if (scan.offsets) run.launch.copy_rows(scan.final_state, scan.initial, scan.sequences * scan.channels * sizeof(S));
  constexpr int64_t ahead = TilesAhead<F, kJobTile<F>>::bytes(kJobThreads);
  static_assert(ahead <= 99 << 10);  // what a block may have on every device from compute capability 8.0 on
  run.over_channels<F>(summarize<F>, run.plan.jobs, kJobThreads, ahead);
  run.carry_over(1);
  if constexpr (F::Cell::kEvents) run.over_channels<F>(expand<F>, run.plan.jobs, kJobThreads);
  else from_streams(run.plan);
  if (run.checks) from_streams(run.check_jobs(1), run.work.again);
}

template <class F>
void run_backward(Run& run) {
  const Scan& scan = run.scan;
  const Plan& plan = run.plan;
  if (plan.chunked()) {
    if (scan.offsets)
      run.launch.copy_rows(scan.grad_initial, scan.grad_final, scan.sequences * scan.channels * sizeof(S));
    run.over_channels<F>(summarize_adjoint<F, F::Cell::kEvents>, plan.jobs, kJobThreads);
    run.carry_over(-1);
  }
  // Registers bear 16 bytes of states.
  using N = typename F::template With<std::min<int>(F::W, 16 / sizeof(S))>;
  run.over_tiles<N, BackwardRoom<N>>(backward<N>, plan.sum_rows, plan);
  if (run.checks) {
    const Plan whole = run.check_jobs(-1);
    run.over_tiles<N, BackwardRoom<N>>(backward<N>, whole.sum_rows, whole, run.work.again);
  }
  int which = 0;
  const auto sum = [&](void* total) {
    if (total)
      run.launch(reduce<S>, ceil_div(scan.channels, kLanes), dim3(kLanes, kGroups), kLanes * kGroups * sizeof(S),
                 run.work, plan.sum_rows, plan.whole_sum_rows, plan.sums, which, scan.channels, static_cast<S*>(total));
    ++which;
  };
  sum(scan.grad_alpha);
  for (int i = 0; i < scan.inputs; ++i)
    if (F::per_channel(i)) sum(scan.grad_channel[i]);
}

// Calls f<Form>() for the cell, the inputs that come per channel and the width of a thread.
template <class Cell, unsigned kChannels, class Each>
void with_width(const Scan& scan, Each each) {
  if (moves_words(scan, kVectorWidth)) each.template operator()<Form<Cell, T, kVectorWidth, kChannels>>();
  else each.template operator()<Form<Cell, T, 1, kChannels>>();
}
template <class Cell, class Each>
void with_channels(const Scan& scan, Each each) {
  if (scan.in[1].channel) with_width<Cell, 2u>(scan, each);
  else with_width<Cell, 0u>(scan, each);
}
template <class Each>
void with_form(const Scan& scan, Each each) {
  if constexpr (RealOf<S>::is_complex) {
    with_channels<Linear<S>>(scan, each);
  } else {
    switch (scan.cell) {
      case CellKind::kBmru:
        return scan.inputs == 3 ? with_channels<Bmru<S, true>>(scan, each) : with_channels<Bmru<S, false>>(scan, each);
      case CellKind::kSchmitt: return with_width<Schmitt<S>, 6u>(scan, each);
      case CellKind::kLinear: return with_channels<Linear<S>>(scan, each);
    }
  }
}

const char* launch_forward(const Scan& scan, void* workspace, void* stream) {
  Run run(scan, false, workspace, stream);
  with_form(scan, [&]<class F>() { run_forward<F>(run); });
  return run.launch.result();
}
const char* launch_backward(const Scan& scan, void* workspace, void* stream) {
  Run run(scan, true, workspace, stream);
  with_form(scan, [&]<class F>() { run_backward<F>(run); });
  return run.launch.result();
}

}  // namespace

#define MRU_CONCAT(a, b) a##b
#define MRU_NAME(element) MRU_CONCAT(kernels_, element)

const Kernels MRU_NAME(MRU_ELEMENT) = {&launch_forward, &launch_backward};

}  // namespace mru::cuda
