// The CUDA kernels of the softmax recurrence under host execution, as ops `mru::softmax_recurrence*.simt` on CPU tensors.
// Everything that a call allocates is filled with NaN first.
#include "../../simt/control.h"
#include "../ops.h"
#include "plan.h"

namespace {

using mru::Tensor;
using mru::softmax::HeadScan;
using mru::softmax::cuda::kernels;

struct Simt {
  static constexpr int64_t kMostChunk = mru::softmax::cuda::kMostChunk;
  static int64_t segment(const mru::Sizes&) { return 0; }  // tests ask for segments

  static void forward(const HeadScan& scan, const Tensor&) {
    simt::poison(scan, scan.h, scan.channels);
    simt::poison(scan.final_state, scan.sequences * row_bytes(scan));
    simt::poison(scan.checkpoints, scan.batch * scan.checkpoint_rows * row_bytes(scan));
    simt::launch(kernels(scan.dtype).workspace_bytes(scan, false),
                 [&](void* work) { return kernels(scan.dtype).forward(scan, work, nullptr); });
  }
  static void backward(const HeadScan& scan, const Tensor&) {
    using namespace mru::softmax;
    for (const int i : {int(kScore), int(kValue), int(kDecay)})
      simt::poison(scan, scan.grad_in[i], i == kValue ? scan.channels : scan.heads);
    for (void* const grad : scan.grad_channel) simt::poison(grad, scan.heads * scan.state_bytes());
    simt::poison(scan.grad_initial, scan.sequences * row_bytes(scan));
    simt::launch(kernels(scan.dtype).workspace_bytes(scan, true),
                 [&](void* work) { return kernels(scan.dtype).backward(scan, work, nullptr); });
  }

 private:
  static int64_t row_bytes(const HeadScan& scan) { return (scan.channels + 2 * scan.heads) * scan.state_bytes(); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mru, CPU, m) { mru::softmax::implement<Simt>(m, "simt"); }

#ifdef MRU_MISSING  // MRU_MISSING(X, cell): X(cell, element) for the element types that this module is built without
namespace mru::softmax::cuda {
#define MRU_NONE(cell, element) const Kernels element{};
MRU_MISSING(MRU_NONE, softmax_recurrence)
}  // namespace mru::softmax::cuda
#endif

PYBIND11_MODULE(MRU_MODULE, m) { simt::bind_control(m); }
