// The CUDA kernels under host execution, as ops `mru::*.simt` on CPU tensors and, for the tests, what there is to set and
// to count. Everything that a call allocates is filled with NaN first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>

#include "../torch/ops.h"
#include "../cuda/plan.h"
#include "simt.h"

namespace {

using mru::Scan;
using mru::Tensor;

void poison(void* p, int64_t bytes) {
  if (p && bytes > 0) std::memset(p, simt::kNanByte, bytes);
}
void poison(const Scan& scan, const mru::Stream& stream) {
  const int64_t size = mru::element_bytes(scan.dtype);
  if (!stream.data) return;
  for (int64_t b = 0; b < scan.batch; ++b)
    for (int64_t t = 0; t < scan.time; ++t)
      poison(static_cast<char*>(stream.data) + (b * stream.batch + t * stream.time) * size, scan.channels * size);
}

void launch(const Scan& scan, bool backward) {
  const int64_t row = scan.channels * mru::state_bytes(scan.dtype);
  if (backward) {
    for (int i = 0; i < scan.inputs; ++i) poison(scan, scan.grad_in[i]), poison(scan.grad_channel[i], row);
    poison(scan.grad_alpha, row);
    poison(scan.grad_initial, scan.sequences * row);
  } else {
    poison(scan, scan.h);
    poison(scan.final_state, scan.sequences * row);
    poison(scan.checkpoints, scan.batch * scan.checkpoint_rows * row);
    poison(scan.events, scan.batch * scan.event_rows * scan.channels * int64_t(sizeof(int32_t)));
  }
  const mru::cuda::Plan plan(scan, backward);
  const int64_t bytes = plan.workspace_bytes();
  // Of the exact size, so that the address sanitizer sees an access beyond its end.
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::malloc(bytes), &std::free);
  poison(workspace.get(), bytes);
  const mru::cuda::Kernels& kernels = mru::cuda::kernels(scan.dtype);
  const char* error = (backward ? kernels.backward : kernels.forward)(scan, workspace.get(), nullptr);
  MRU_EXPECT(!error, "simt: ", error ? error : "");
}

struct Simt {
  static constexpr int64_t kMostChunk = mru::cuda::kMostChunk;
  static void forward(const Scan& scan, const Tensor&) { launch(scan, false); }
  static void backward(const Scan& scan, const Tensor&) { launch(scan, true); }
};

std::map<std::string, std::array<uint64_t, 2>> traffic() {
  constexpr const char* names[simt::kKinds] = {"stream", "events", "state", "index"};
  std::map<std::string, std::array<uint64_t, 2>> all;
  for (int i = 0; i < simt::kKinds; ++i) all[names[i]] = {simt::control.read[i], simt::control.written[i]};
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mru, CPU, m) { mru::implement_cells<Simt>(m, "simt"); }

#ifdef MRU_MISSING  // element types that this module is built without
namespace mru::cuda {
const Kernels MRU_MISSING;
}
#endif

PYBIND11_MODULE(MRU_MODULE, m) {
  m.def("traffic", &traffic, "Bytes read and written since the last reset, by kind.");
  m.def("reset_traffic", [] {
    for (int i = 0; i < simt::kKinds; ++i) simt::control.read[i] = simt::control.written[i] = 0;
  });
  m.def(
      "configure",
      [](uint64_t seed, unsigned resident, uint64_t budget, int most_shared) {
        simt::control.seed = seed, simt::control.resident = resident, simt::control.budget = budget;
        simt::control.most_shared = most_shared;
      },
      pybind11::arg("seed") = 1, pybind11::arg("resident") = 24, pybind11::arg("budget") = 20'000'000,
      pybind11::arg("most_shared") = 163 << 10);
}
