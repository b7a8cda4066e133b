// Launches of the softmax recurrence for one element type: compiled once per type, with -DMRU_ELEMENT=float32 and so on.
#include "../../cuda/carry.cuh"
#include "../../cuda/launch.cuh"
#include "backward.cuh"
#include "carry.cuh"
#include "forward.cuh"

namespace mru::softmax::cuda {
namespace {

struct Element {
  using float32 = float;
  using float64 = double;
  using bfloat16 = BFloat16;
  using float16 = Float16;
};
using T = Element::MRU_ELEMENT;
using S = StateOf<T>::type;
constexpr int kWide = sizeof(T) == 2 ? 2 : 1;        // channels of a thread that are heads: 4 bytes
constexpr int kWideOfHead = sizeof(T) == 8 ? 2 : 4;  // channels of one head: up to 16 bytes

using Plain = Form<T, 1, false, false>;  // for kernels whose threads have one channel

// One call of an op: its launches, in order.
template <class F>
class Op {
  using NoBonus = Form<T, F::W, false, F::kHeads>;

 public:
  Op(const HeadScan& scan, bool backward, void* workspace, void* stream)
      : call_{scan, Plan(scan, backward, F::W), static_cast<char*>(workspace)}, launch_(stream) {}

  const char* forward() {
    const HeadScan& scan = call_.scan;
    if (scan.offsets && scan.checkpoints)
      launch_.copy_rows(scan.checkpoints, nullptr,
                        scan.batch * scan.checkpoint_rows * call_.plan.columns * int64_t(sizeof(S)));
    if (call_.plan.is_cut()) {
      over_segments(summarize<NoBonus>, kThreads, 0, call_.template as<NoBonus>());
      over_sequences(carry<Plain>);
    }
    over_segments(cuda::forward<F>, kThreads, 0, call_);
    return launch_.result();
  }
  const char* backward() {
    const HeadScan& scan = call_.scan;
    if (call_.plan.is_cut()) {
      call_.from_zero = true;
      over_segments(cuda::backward<F>, kBackwardThreads, Room<F>::bytes(scan), call_);
      call_.from_zero = false;
      over_sequences(carry_adjoint<Plain>);
    }
    over_segments(cuda::backward<F>, kBackwardThreads, Room<F>::bytes(scan), call_);
    if (call_.plan.parts > 1) {
      const int64_t steps = scan.batch * scan.time;
      add(call_.plan.of_score, steps, scan.grad_in[kScore]);
      if (scan.grad_in[kDecay].data) add(call_.plan.of_decay, steps, scan.grad_in[kDecay]);
      add(call_.plan.of_initial, scan.sequences, {});
    }
    reduce_sums();
    return launch_.result();
  }

 private:
  template <class G>
  void over_segments(void (*kernel)(Call<G>), int64_t threads, int64_t shared, const Call<G>& call) {
    const int64_t count = call_.plan.segments * call_.plan.across.divisor() * (F::kHeads ? kWarp : 1);
    launch_(kernel, call_.scan.channels ? ceil_div(count, threads) : 0, dim3(unsigned(threads)), shared, call);
  }
  void over_sequences(void (*kernel)(Call<Plain>)) {
    launch_(kernel, call_.scan.sequences * ceil_div(call_.scan.channels, kCarryChannels),
            dim3(unsigned(kWarp), kCarryChannels), 0, call_.template as<Plain>());
  }
  void add(int64_t place, int64_t rows, const Stream& stream) {
    launch_(add_parts<Plain>, ceil_div(rows * call_.scan.heads, kAddThreads), dim3(kAddThreads), 0,
            call_.template as<Plain>(), place, rows, stream, Divisor(call_.scan.heads),
            Divisor(std::max<int64_t>(call_.scan.time, 1)));
  }
  void reduce_sums() {
    Workspace<S> work{};
    work.sums = call_.work(call_.plan.sums_at);
    int which = 0;
    for (void* const total : call_.scan.grad_channel)
      if (total)
        launch_(reduce<S>, ceil_div(call_.scan.heads, kLanes), dim3(kLanes, kGroups), kLanes * kGroups * sizeof(S),
                work, call_.plan.sum_rows, call_.plan.sum_rows, call_.plan.sums, which++, call_.scan.heads,
                static_cast<S*>(total));
  }

  Call<F> call_;
  Launcher launch_;
};

// Whether threads may have `width` channels, and as many heads if those have one channel: every word is aligned.
bool has_words(const HeadScan& scan, int64_t width, bool of_head) {
  const auto fits = [&](const Stream& s) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(s.data) % (width * sizeof(T)) == 0;
    return is_aligned && s.batch % width == 0 && s.time % width == 0;
  };
  bool all = (of_head ? scan.channels / scan.heads : scan.channels) % width == 0;
  for (const Stream* s : {&scan.in[kValue].stream, &scan.h, &scan.grad_h, &scan.grad_in[kValue]}) all = all && fits(*s);
  if (of_head) return all;
  for (int i : {kScore, kDecay}) all = all && fits(scan.in[i].stream) && fits(scan.grad_in[i]);
  return all;
}
// Calls each<Form>().
template <class Each>
auto with_form(const HeadScan& scan, Each each) {
  const auto with = [&]<int kWidth, bool kHeads>() {
    if (scan.in[kBonus].channel) return each.template operator()<Form<T, kWidth, true, kHeads>>();
    return each.template operator()<Form<T, kWidth, false, kHeads>>();
  };
  if (scan.heads < scan.channels) {
    if (has_words(scan, kWideOfHead, true)) return with.template operator()<kWideOfHead, true>();
    return with.template operator()<1, true>();
  }
  if (has_words(scan, kWide, false)) return with.template operator()<kWide, false>();
  return with.template operator()<1, false>();
}

int64_t workspace_bytes(const HeadScan& scan, bool backward) {
  return with_form(scan, [&]<class F>() { return Plan(scan, backward, F::W).workspace_bytes(); });
}
const char* launch_forward(const HeadScan& scan, void* workspace, void* stream) {
  return with_form(scan, [&]<class F>() { return Op<F>(scan, false, workspace, stream).forward(); });
}
const char* launch_backward(const HeadScan& scan, void* workspace, void* stream) {
  return with_form(scan, [&]<class F>() { return Op<F>(scan, true, workspace, stream).backward(); });
}

}  // namespace

const Kernels MRU_ELEMENT{&workspace_bytes, &launch_forward, &launch_backward};

}  // namespace mru::softmax::cuda
