// The kernels. Compiled once per instruction set (MRU_ISA): everything is local to this file or always inlined, so that no
// code of one instruction set can be linked into another's.
#include "kernels.h"

#include "backward.h"
#include "carry.h"
#include "forward.h"

namespace mru::softmax {
namespace {

template <class F>
constexpr HeadKernels table = {.forward = &forward<F>,
                               .summarize = &summarize<typename F::WithoutBonus>,
                               .sum_decays = &sum_decays<typename F::WithoutBonus>,
                               .backward = &backward<F>,
                               .carry = &carry<F>,
                               .carry_adjoint = &carry_adjoint<F>,
                               .total = &total<F>};

template <class T, Decay kDecay>
const HeadKernels& with_bonus(const HeadScan& scan) {
  return scan.in[kBonus].channel ? table<Form<T, kDecay, true>> : table<Form<T, kDecay, false>>;
}
template <class T>
const HeadKernels& with_decay(const HeadScan& scan) {
  if (scan.in[kDecay].channel) return with_bonus<T, Decay::kHead>(scan);
  return scan.in[kDecay].stream.data ? with_bonus<T, Decay::kStream>(scan) : with_bonus<T, Decay::kNone>(scan);
}

}  // namespace

template <Isa>
const HeadKernels& head_kernels(const HeadScan& scan) {
  switch (scan.dtype) {
    case Dtype::kFloat64: return with_decay<double>(scan);
    case Dtype::kBFloat16: return with_decay<BFloat16>(scan);
    case Dtype::kFloat16: return with_decay<Float16>(scan);
    default: return with_decay<float>(scan);
  }
}

template const HeadKernels& head_kernels<Isa::MRU_ISA>(const HeadScan&);

}  // namespace mru::softmax
