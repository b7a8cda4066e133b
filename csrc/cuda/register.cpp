// The CUDA backend's kernels of the ops that mru_kernels/ops.py defines, for every cell. The build makes cells.h.
#include "../torch/ops.h"
#include "cells.h"
#include "plan.h"

// torch has it if it is built with CUDA. Weak, so that this extension loads on any torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace {

using mru::Scan;
using mru::Tensor;
using mru::cuda::kernels;

// Calls run(workspace, stream) on the device of `like` and its current stream. The workspace comes from torch's
// allocator, which knows streams and graph captures.
template <class Run>
void launch(const Scan& scan, bool backward, const Tensor& like, Run run) {
  MRU_EXPECT(aoti_torch_get_current_cuda_stream, "backend: 'cuda' needs a torch that is built with CUDA");
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const mru::cuda::Plan plan(scan, backward);
  Tensor workspace = mru::allocate(like, {plan.workspace_bytes()}, mru::ScalarType::Byte);
  const char* const error = run(workspace.data_ptr(), stream);
  MRU_EXPECT(!error, "CUDA: ", error ? error : "");
}

struct Cuda {
  static constexpr mru::BackendInfo kInfo = {mru::cuda::kMostChunk, &mru::cuda::segment};

  template <class C>
  static void forward(const Scan& scan, const Tensor& like) {
    launch(scan, false, like,
           [&](void* work, void* stream) { return kernels<C>(scan.dtype).forward(scan, work, stream); });
  }
  template <class C>
  static void backward(const Scan& scan, const Tensor& like) {
    launch(scan, true, like,
           [&](void* work, void* stream) { return kernels<C>(scan.dtype).backward(scan, work, stream); });
  }
  template <class C>
  static void map(Scan scan, const Tensor& factor, const Tensor& offset) {
    if (scan.offsets) scan.segment = 0;  // a packed sequence is one segment
    launch(scan, false, factor, [&](void* work, void* stream) {
      return kernels<C>(scan.dtype).map(scan, factor.data_ptr(), offset.data_ptr(), work, stream);
    });
  }
};

}  // namespace

#define MRU_IMPLEMENT(cell) mru::implement<Cuda, mru::cells::cell>(m, #cell, "cuda");
STABLE_TORCH_LIBRARY_IMPL(mru, CUDA, m) { MRU_EACH_CELL(MRU_IMPLEMENT) }
