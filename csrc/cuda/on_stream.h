// Calls of the CUDA kernels on torch's current stream.
#pragma once
#include "../torch/tensors.h"

// torch has it if it is built with CUDA. Weak, so that this extension loads on any torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace mru::cuda {

// Calls run(workspace, stream) on the device of `like` and its current stream. The workspace of `bytes` comes from torch's
// allocator, which knows streams and graph captures.
template <class Run>
void launch(int64_t bytes, const Tensor& like, Run run) {
  MRU_CHECK(aoti_torch_get_current_cuda_stream, "backend: 'cuda' needs a torch that is built with CUDA");
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  Tensor workspace = allocate(like, {bytes}, ScalarType::Byte);
  const char* const error = run(workspace.data_ptr(), stream);
  MRU_CHECK(!error, "CUDA: ", error ? error : "");
}

}  // namespace mru::cuda
