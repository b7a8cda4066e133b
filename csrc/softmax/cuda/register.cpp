// The CUDA backend's kernels of the softmax recurrence, as ops.
#include "../../cuda/on_stream.h"
#include "../ops.h"
#include "plan.h"

namespace {

using mru::Tensor;
using mru::softmax::HeadScan;
using mru::softmax::cuda::kernels;

struct Cuda {
  static constexpr int64_t kMostChunk = mru::softmax::cuda::kMostChunk;
  static constexpr int64_t segment(const mru::Sizes& sizes) { return mru::softmax::cuda::segment(sizes); }

  static void forward(const HeadScan& scan, const Tensor& like) {
    mru::cuda::launch(kernels(scan.dtype).workspace_bytes(scan, false), like,
                      [&](void* work, void* stream) { return kernels(scan.dtype).forward(scan, work, stream); });
  }
  static void backward(const HeadScan& scan, const Tensor& like) {
    mru::cuda::launch(kernels(scan.dtype).workspace_bytes(scan, true), like,
                      [&](void* work, void* stream) { return kernels(scan.dtype).backward(scan, work, stream); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mru, CUDA, m) { mru::softmax::implement<Cuda>(m, "cuda"); }
