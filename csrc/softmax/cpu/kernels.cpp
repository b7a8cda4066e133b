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
                               .carry = &carry<typename F::OfStates>,
                               .carry_adjoint = &carry_adjoint<typename F::OfStates>,
                               .total = &total<typename F::OfStates>};

// Whether every head of the call is moderate, not only those of a block: so no result depends on the blocks of heads.
template <class S>
bool is_moderate(const HeadScan& scan) {
  const S* const decays = static_cast<const S*>(scan.in[kDecay].channel);
  const S* const bonuses = static_cast<const S*>(scan.in[kBonus].channel);
  const auto moderate = [](S x) { return -kModerate<S> <= x && x <= kModerate<S>; };
  bool all = true;
  for (int64_t h = 0; h < scan.heads; ++h) {
    const S decay = decays ? decays[h] : 0, bonus = bonuses ? bonuses[h] : 0;
    all &= moderate(decay) && moderate(decay + bonus);
  }
  return all;
}

template <class T, Decay kDecay, bool kBonus>
const HeadKernels& with_form(const HeadScan& scan) {
  if constexpr (kDecay == Decay::kStream) return table<Form<T, kDecay, kBonus, false>>;
  else if constexpr (kDecay == Decay::kNone && !kBonus) return table<Form<T, kDecay, kBonus, true>>;
  else
    return is_moderate<typename StateOf<T>::type>(scan) ? table<Form<T, kDecay, kBonus, true>>
                                                        : table<Form<T, kDecay, kBonus, false>>;
}
template <class T, Decay kDecay>
const HeadKernels& with_bonus(const HeadScan& scan) {
  return scan.in[kBonus].channel ? with_form<T, kDecay, true>(scan) : with_form<T, kDecay, false>(scan);
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
