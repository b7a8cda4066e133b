// The table of kernels. Compiled once per instruction set (MRU_ISA) and cell (MRU_CELL, a file of csrc/cells).
#include "kernels.h"

// clang-format off
#define MRU_TEXT(x) #x
#define MRU_HEADER(cell) MRU_TEXT(cells/cell.h)
// clang-format on
#include MRU_HEADER(MRU_CELL)

#include "backward.h"
#include "forward.h"
#include "maps.h"
#include "summary.h"

namespace mru {
namespace {

template <class F, Codes kCodes>
constexpr auto forward_if_codes() {
  if constexpr (F::Cell::kCodes) return &forward<F, kCodes>;
  else return nullptr;
}

template <class F>
constexpr decltype(Kernels::summarize) summarize_if_composes() {
  if constexpr (F::Cell::kComposes) return &summarize<F>;
  else return nullptr;
}
template <class F>
constexpr decltype(Kernels::summarize_adjoint) summarize_adjoint_if_composes() {
  if constexpr (F::Cell::kComposes) return &summarize_adjoint<F>;
  else return nullptr;
}

template <class F>
constexpr Kernels table = {.inputs = F::kInputs,
                           .channels = F::kPerChannel,
                           .adjoint_sees_state = F::Cell::kAdjointSeesState,
                           .overwrites = &MapRows<F>::overwrites,
                           .forward = &forward<F, Codes::kNone>,
                           .forward_from_codes = forward_if_codes<F, Codes::kRead>(),
                           .forward_to_codes = forward_if_codes<F, Codes::kPack>(),
                           .summarize = summarize_if_composes<F>(),
                           .summarize_adjoint = summarize_adjoint_if_composes<F>(),
                           .backward = &backward<F>,
                           .take = &MapRows<F>::take,
                           .reduce = &reduce<F>,
                           .enter = &MapRows<F>::enter,
                           .fill_ones = &MapRows<F>::fill_ones,
                           .identity = &MapRows<F>::identity,
                           .head = &MapRows<F>::head,
                           .constant = &MapRows<F>::constant,
                           .apply = &MapRows<F>::apply,
                           .then = &MapRows<F>::then,
                           .look_through = &MapRows<F>::look_through,
                           .consistent = &MapRows<F>::consistent,
                           .absorb = &MapRows<F>::absorb};

template <class C, unsigned kGiven, unsigned kChannels>
const Kernels& with_dtype(Dtype dtype) {
  if constexpr (C::kComplex) {
    if (dtype == Dtype::kComplex64) return table<Form<C, Complex<float>, kGiven, kChannels>>;
    if (dtype == Dtype::kComplex128 || !C::kReal) return table<Form<C, Complex<double>, kGiven, kChannels>>;
  }
  if constexpr (C::kReal) {
    switch (dtype) {
      case Dtype::kFloat64: return table<Form<C, double, kGiven, kChannels>>;
      case Dtype::kBFloat16: return table<Form<C, BFloat16, kGiven, kChannels>>;
      case Dtype::kFloat16: return table<Form<C, Float16, kGiven, kChannels>>;
      default: return table<Form<C, float, kGiven, kChannels>>;
    }
  }
}

}  // namespace

template <Isa, class C>
const Kernels& kernels(const Scan& scan) {
  unsigned given = 0, per_channel = 0;
  for (int i = 0; i < C::inputs(); ++i) {
    given |= unsigned(scan.in[i].channel || scan.in[i].stream.data) << i;
    per_channel |= unsigned(scan.in[i].channel != nullptr) << i;
  }
  return with_form<C>(given, per_channel, [&]<unsigned kGiven, unsigned kChannels>() -> const Kernels& {
    return with_dtype<C, kGiven, kChannels>(scan.dtype);
  });
}

template const Kernels& kernels<Isa::MRU_ISA, cells::MRU_CELL>(const Scan&);

}  // namespace mru
