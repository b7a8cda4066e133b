// Defines the ops of every cell and of the softmax recurrence for the C++ backends, so that a process without Python has
// them, and the ops `segment`, which return the backend's choice. The build writes cells.h, and schemas.h from
// mru_kernels/ops/schemas.py and mru_kernels/softmax/schemas.py.
#include <cells.h>
#include <schemas.h>

#include "../cpu/isa.h"
#include "../segment.h"
#include "tensors.h"

namespace {

#define MRU_NAME(cell) #cell,
constexpr const char* kCells[] = {MRU_EACH_CELL(MRU_NAME)};
constexpr const char* kBackends[] = {"cpu", "cuda"};

template <int64_t (*kSegment)(const mru::Sizes&)>
int64_t segment(int64_t sequences, int64_t steps, int64_t channels, int64_t itemsize) {
  return kSegment({sequences, steps, channels, itemsize});
}

std::string cpu_isa() { return mru::cpu::isa_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mru, m) {
  for (const std::string backend : kBackends) {
    for (const std::string cell : kCells)
      for (const auto& [suffix, schema] : mru::kSchemas) m.def((cell + suffix + "." + backend + schema).c_str());
    for (const auto& [suffix, schema] : mru::kSoftmaxSchemas)
      m.def((std::string("softmax_recurrence") + suffix + "." + backend + schema).c_str());
    m.def(("segment." + backend + "(int sequences, int steps, int channels, int itemsize) -> int").c_str());
  }
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mru, CompositeExplicitAutograd, m) {
  m.impl("segment.cpu", TORCH_BOX(&segment<mru::cpu::segment>));
  m.impl("segment.cuda", TORCH_BOX(&segment<mru::cuda::segment>));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
