// Registers the CPU kernels of every cell as the ops that mru_kernels/ops defines.
#include <cells.h>

#include "../torch/ops.h"
#include "driver.h"
#include "isa.h"

namespace {

using mru::Scan;
using mru::Tensor;

struct Cpu {
  static constexpr mru::BackendInfo kInfo = {/*most_chunk=*/4096, &mru::cpu::segment};

  template <class C>
  static void forward(const Scan& scan, const Tensor&) {
    mru::cpu::forward(scan, mru::cpu::choose<C>(scan));
  }
  template <class C>
  static void backward(const Scan& scan, const Tensor&) {
    mru::cpu::backward(scan, mru::cpu::choose<C>(scan));
  }
  template <class C>
  static void map(const Scan& scan, Tensor& factor, Tensor& offset) {
    mru::cpu::map(scan, mru::cpu::choose<C>(scan), {factor.data_ptr(), offset.data_ptr()});
  }
};

}  // namespace

#define MRU_IMPLEMENT(name) mru::implement<Cpu, mru::cells::name>(m, #name, "cpu");
STABLE_TORCH_LIBRARY_IMPL(mru, CPU, m) { MRU_EACH_CELL(MRU_IMPLEMENT) }
