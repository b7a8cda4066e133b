// How the host launches kernels.
#pragma once
#include <cuda_runtime.h>

#include "../segment.h"

namespace mru::cuda {

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

}  // namespace mru::cuda
