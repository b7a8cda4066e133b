// The part of cuda_runtime.h that the CUDA sources use, for a host compiler, on top of simt.h.
#pragma once
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("mru_simt_shared")))  // not for inline functions or templates

inline void __syncthreads(std::source_location at = std::source_location::current()) { simt::barrier(at); }
inline void __syncwarp(unsigned mask = ~0u) { simt::meet(mask, 0, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { simt::yield(); }

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* const values = simt::meet(mask, predicate != 0, 1);
  unsigned set = 0;
  for (int lane = 0; lane < simt::kWarp; ++lane)
    if (mask >> lane & 1) set |= unsigned(values[lane] & 1) << lane;
  return set;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

namespace simt {
// The value of lane from(lane). A lane keeps its own value if `from` returns the lane itself.
template <class T, class From>
T exchange(unsigned mask, T value, int operation, From from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* const values = meet(mask, bits, operation);
  std::memcpy(&value, &values[from(int(current->index % kWarp))], sizeof value);
  return value;
}
}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::exchange(mask, value, 2, [=](int lane) { return (lane & ~(width - 1)) + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::exchange(mask, value, 3,
                        [=](int lane) { return lane - int(delta) < (lane & ~(width - 1)) ? lane : lane - int(delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::exchange(mask, value, 4,
                        [=](int lane) { return lane + int(delta) > (lane | (width - 1)) ? lane : lane + int(delta); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int = 32) {
  return simt::exchange(mask, value, 5, [=](int lane) { return lane ^ lanes; });
}

template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicCAS(T* p, T compare, T value) {
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}

// ------------------------------------------------------------------------------------------------ the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : simt::failure.c_str();
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = simt::control.most_shared;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  if (bytes <= simt::control.most_shared) return cudaSuccess;
  simt::failure = "more dynamic shared memory than a block may have";
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const bool done =
      simt::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(Parameters(arguments)...); });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}
