#include "isa.h"

#include <cstdlib>
#include <string_view>

namespace mru::cpu {

Isa isa() {
#ifdef MRU_CHOOSES_ISA
  static const Isa widest = [] {
    const char* const variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view most = variable ? variable : "";
    if (most == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) return Isa::kBaseline;
    if (most == "avx2" || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return Isa::kAvx2;
    return Isa::kAvx512;
  }();
  return widest;
#else
  return Isa::kBaseline;
#endif
}

const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace mru::cpu
