// The CUDA backend's kernels of the ops that mru_kernels/ops.py defines.
#include "../torch/ops.h"
#include "plan.h"

// Known where torch is built with CUDA: weak, so that this extension loads on any torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace {

using mru::Scan;
using mru::Tensor;

// On the device of `like` and its current stream. The workspace comes from torch's allocator, which knows streams and
// graph captures.
void launch(const Scan& scan, bool backward, const Tensor& like) {
  MRU_EXPECT(aoti_torch_get_current_cuda_stream, "backend: 'cuda' needs a torch that is built with CUDA");
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const mru::cuda::Plan plan(scan, backward);
  Tensor workspace = mru::allocate(like, {plan.workspace_bytes()}, mru::ScalarType::Byte);
  const mru::cuda::Kernels& kernels = mru::cuda::kernels(scan.dtype);
  const char* error = (backward ? kernels.backward : kernels.forward)(scan, workspace.data_ptr(), stream);
  MRU_EXPECT(!error, "CUDA: ", error ? error : "");
}

struct Cuda {
  static constexpr int64_t kMostChunk = mru::cuda::kMostChunk;
  static void forward(const Scan& scan, const Tensor& like) { launch(scan, false, like); }
  static void backward(const Scan& scan, const Tensor& like) { launch(scan, true, like); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mru, CUDA, m) { mru::implement_cells<Cuda>(m, "cuda"); }
