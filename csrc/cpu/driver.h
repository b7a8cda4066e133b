// Runs a Scan on the CPU: splits it into pieces and blocks of channels and threads over them.
#pragma once
#include "kernels.h"

namespace mru::cpu {

Isa isa();  // the widest instruction set that this machine has and this build holds
const char* isa_name();
void forward(Scan scan);
void backward(Scan scan);

}  // namespace mru::cpu
