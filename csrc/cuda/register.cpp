// The CUDA backend's kernels of the ops that mru_kernels/ops.py defines, for every cell. The build makes cells.h.
#include "../torch/ops.h"
#include "cells.h"
#include "on_stream.h"
#include "plan.h"

namespace {

using mru::Scan;
using mru::Tensor;
using mru::cuda::kernels;

template <class Run>
void launch(const Scan& scan, bool backward, const Tensor& like, Run run) {
  mru::cuda::launch(mru::cuda::Plan(scan, backward).workspace_bytes(), like, run);
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
