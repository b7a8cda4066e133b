// Tests of the host execution itself: each case is one small kernel. Prints the result of the case that argv[1] names.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <map>
#include <string>

namespace {

// ---- what must work

__global__ void sum_of_a_warp(int* out) {
  int value = int(threadIdx.x);
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(~0u, value, delta);
  const int all = __shfl_sync(~0u, value, 0);
  int before = 1;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int left = __shfl_up_sync(~0u, before, delta);
    if (int(threadIdx.x) >= delta) before += left;
  }
  const int partner = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
  const unsigned odd = __ballot_sync(~0u, threadIdx.x & 1);
  const bool right = all == 31 * 16 && before == int(threadIdx.x) + 1 && partner == int(threadIdx.x ^ 1) &&
                     odd == 0xaaaaaaaau && __any_sync(~0u, threadIdx.x == 3) && !__all_sync(~0u, threadIdx.x == 3);
  out[threadIdx.x] = right;
}

__global__ void reversed_in_shared_memory(int* out) {
  __shared__ int fixed[64];
  fixed[threadIdx.x] = int(blockIdx.x * 64 + threadIdx.x);
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = fixed[63 - threadIdx.x];
}

__global__ void tickets(int* counter, int* out) { out[atomicAdd(counter, 1)] += 1; }

// A block waits for the one before it, as in a look-back.
__global__ void chain(volatile int* flags, int* counter) {
  const int block = atomicAdd(counter, 1);
  if (block > 0)
    while (flags[block - 1] == 0) __nanosleep(1);
  flags[block] = flags[block > 0 ? block - 1 : 0] + 1;
}

// ---- what must be caught

__global__ void reads_before_it_is_written(float* out) {
  float* const shared = reinterpret_cast<float*>(simt::shared_memory());
  shared[threadIdx.x] = 1;
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}
__global__ void meets_at_two_places() {
  if (threadIdx.x % 2) __syncthreads();
  else __syncthreads();
}
__global__ void leaves_before_the_barrier() {
  if (threadIdx.x == 0) return;
  __syncthreads();
}
__global__ void waits_for_a_lane_that_never_comes() {
  if (threadIdx.x > 0) __syncwarp();
}
__global__ void shuffles_in_two_branches(int* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
  else out[threadIdx.x] = __shfl_up_sync(~0u, 1, 1);
}
__global__ void spins_without_end(volatile int* flag) {
  while (*flag == 0) __nanosleep(1);
}
__global__ void reads_off_its_alignment(const float* in, float* out) {
  struct alignas(16) Four {
    float at[4];
  };
  *out = simt::load(0, reinterpret_cast<const Four*>(in + 1)).at[0];
}

template <class... P, class... A>
std::string launch(void (*kernel)(P...), unsigned blocks, unsigned threads, A... arguments) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = 4 * threads;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? "done" : cudaGetErrorString(error);
}

template <class Right>
std::string all(int count, const int* out, Right right) {
  for (int i = 0; i < count; ++i)
    if (!right(i, out[i])) return "wrong at " + std::to_string(i);
  return "right";
}

}  // namespace

int main(int, char** argv) {
  alignas(16) int out[256] = {}, counter = 0, zero = 0;
  alignas(16) float values[64] = {};
  simt::control.budget = 100'000;
  const std::string name = argv[1];
  std::string outcome;
  if (name == "warp") {
    launch(sum_of_a_warp, 1, 32, out);
    outcome = all(32, out, [](int, int x) { return x == 1; });
  } else if (name == "static shared memory") {
    launch(reversed_in_shared_memory, 4, 64, out);
    outcome = all(256, out, [](int i, int x) { return x == i / 64 * 64 + 63 - i % 64; });
  } else if (name == "atomics") {
    launch(tickets, 4, 64, &counter, out);
    outcome = all(256, out, [](int, int x) { return x == 1; });
  } else if (name == "chain of blocks") {
    launch(chain, 40, 1, out, &counter);
    outcome = all(40, out, [](int i, int x) { return x == i + 1; });
  } else if (name == "shared memory not written") {
    launch(reads_before_it_is_written, 1, 64, values);
    outcome = "right";
    for (float x : values)
      if (std::isnan(x)) outcome = "NaN";
  } else if (name == "barriers that differ") {
    outcome = launch(meets_at_two_places, 1, 64);
  } else if (name == "a thread that left") {
    outcome = launch(leaves_before_the_barrier, 1, 64);
  } else if (name == "deadlock") {
    outcome = launch(waits_for_a_lane_that_never_comes, 1, 32);
  } else if (name == "divergent shuffles") {
    outcome = launch(shuffles_in_two_branches, 1, 32, out);
  } else if (name == "livelock") {
    outcome = launch(spins_without_end, 1, 1, &zero);
  } else if (name == "misaligned") {
    outcome = launch(reads_off_its_alignment, 1, 1, static_cast<const float*>(values), values);
  }
  std::puts(outcome.c_str());
}
