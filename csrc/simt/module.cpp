// The CUDA kernels under host execution as ops `mru::*.simt` on CPU tensors, and functions for the tests that set the
// scheduler and count the traffic. Everything that a call allocates is filled with NaN first. The build makes cells.h.
#include "../cuda/plan.h"
#include "../torch/ops.h"
#include "cells.h"
#include "control.h"

namespace {

using mru::Scan;
using mru::Tensor;
using mru::cuda::kernels;
using simt::poison;

template <class Run>
void launch(const Scan& scan, bool backward, Run run) {
  simt::launch(mru::cuda::Plan(scan, backward).workspace_bytes(), run);
}

struct Simt {
  static int64_t segment(const mru::Sizes&) { return 0; }  // tests ask for segments
  static constexpr mru::BackendInfo kInfo = {mru::cuda::kMostChunk, &segment};

  template <class C>
  static void forward(const Scan& scan, const Tensor&) {
    poison(scan, scan.h, scan.channels);
    if (!scan.slots) poison(scan.final_state, scan.sequences * row_bytes(scan));
    poison(scan.checkpoints, scan.batch * scan.checkpoint_rows * row_bytes(scan));
    poison(scan.codes, scan.batch * scan.code_rows * scan.channels * int64_t(sizeof(int32_t)));
    launch(scan, false, [&](void* work) { return kernels<C>(scan.dtype).forward(scan, work, nullptr); });
  }
  template <class C>
  static void backward(const Scan& scan, const Tensor&) {
    for (const mru::Stream& grad : scan.grad_in) poison(scan, grad, scan.channels);
    for (void* const grad : scan.grad_channel) poison(grad, row_bytes(scan));
    poison(scan.grad_initial, scan.sequences * row_bytes(scan));
    poison(scan.grad_reset_state, scan.sequences * row_bytes(scan));
    launch(scan, true, [&](void* work) { return kernels<C>(scan.dtype).backward(scan, work, nullptr); });
  }
  template <class C>
  static void map(Scan scan, const Tensor& factor, const Tensor& offset) {
    if (scan.offsets) scan.segment = 0;  // a packed sequence is one segment
    for (const Tensor& t : {factor, offset}) poison(t.data_ptr(), scan.sequences * row_bytes(scan));
    launch(scan, false, [&](void* work) {
      return kernels<C>(scan.dtype).map(scan, factor.data_ptr(), offset.data_ptr(), work, nullptr);
    });
  }

 private:
  static int64_t row_bytes(const Scan& scan) { return scan.channels * mru::element_bytes(scan.state); }
};

// What the tests cannot know of a cell from Python.
template <class C>
std::map<std::string, bool> traits() {
  using Cell = typename C::template Cell<float, C::all()>;
  return {{"resets", Cell::kOverwrites}, {"adjoint_sees_state", Cell::kAdjointSeesState}};
}
std::map<std::string, std::map<std::string, bool>> cells() {
#define MRU_TRAITS(cell) {#cell, traits<mru::cells::cell>()},
  return {MRU_EACH_CELL(MRU_TRAITS)};
}

}  // namespace

#define MRU_IMPLEMENT(cell) mru::implement<Simt, mru::cells::cell>(m, #cell, "simt");
STABLE_TORCH_LIBRARY_IMPL(mru, CPU, m) { MRU_EACH_CELL(MRU_IMPLEMENT) }

#ifdef MRU_MISSING  // MRU_MISSING(X, cell): X(cell, element) for the element types that this module is built without
namespace mru::cuda {
#define MRU_NONE(cell, element) \
  template <>                   \
  const Kernels KernelsOf<cells::cell>::element{};
#define MRU_NONE_OF(cell) MRU_MISSING(MRU_NONE, cell)
MRU_EACH_CELL(MRU_NONE_OF)
}  // namespace mru::cuda
#endif

PYBIND11_MODULE(MRU_MODULE, m) {
  simt::bind_control(m);
  m.def("cells", &cells, "Traits of every cell.");
}
