// Runs a Scan on the CPU: cuts it into segments and blocks of channels and spreads these over threads.
//
//   time       A sequence is one segment or, if scan.segment > 0, several: they are reduced to maps in parallel, given their
//              entry states by a short sequential pass, and then scanned in parallel. The cut and the order of every sum are
//              functions of sizes only, so results do not depend on the number of threads. If writes overwrite the state, a
//              forward pass only copies values, so its cut may suit the threads, and the backward pass cuts a few wide
//              sequences. Segments of few channels are interleaved (interleaved.h).
//   channels   Channels never interact, so a row may be cut into blocks to suit the threads without changing a bit.
#pragma once
#include "kernels/kernels.h"

namespace mru::cpu {

void forward(Scan scan, const Kernels& kernels);
void backward(Scan scan, const Kernels& kernels);
// The steps of each sequence as one map of the state: [sequences, D].
void map(Scan scan, const Kernels& kernels, MapRow maps);

}  // namespace mru::cpu
