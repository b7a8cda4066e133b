// The CPU backend's kernels of the ops that mru_kernels/ops.py defines.
#include "../torch/ops.h"
#include "driver.h"

namespace {

struct Cpu {
  static constexpr int64_t kMostChunk = 4096;
  static void forward(const mru::Scan& scan, const mru::Tensor&) { mru::cpu::forward(scan); }
  static void backward(const mru::Scan& scan, const mru::Tensor&) { mru::cpu::backward(scan); }
};

std::string cpu_isa() { return mru::cpu::isa_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mru, CPU, m) { mru::implement_cells<Cpu>(m, "cpu"); }

STABLE_TORCH_LIBRARY_IMPL(mru, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
