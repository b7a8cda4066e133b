// The instruction set of the kernels.
#pragma once
#include "kernels/kernels.h"

#if defined(__x86_64__) && !defined(MRU_ONE_ISA)
#define MRU_CHOOSES_ISA
#endif

namespace mru::cpu {

// The widest set that the processor has, but none wider than ATEN_CPU_CAPABILITY allows, as for torch's own kernels.
Isa isa();
const char* isa_name();

// The kernels of cell C for a scan.
template <class C>
const Kernels& choose(const Scan& scan) {
  switch (isa()) {
#ifdef MRU_CHOOSES_ISA
    case Isa::kAvx512: return kernels<Isa::kAvx512, C>(scan);
    case Isa::kAvx2: return kernels<Isa::kAvx2, C>(scan);
#endif
    default: return kernels<Isa::kBaseline, C>(scan);
  }
}

}  // namespace mru::cpu
