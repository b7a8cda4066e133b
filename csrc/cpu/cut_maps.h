// The segments of a scan as maps, and the states between them. The same for the adjoint, where a state is m = dL/ds and
// segments follow each other from the right to the left.
#pragma once
#include "plan.h"

namespace mru::cpu {

struct CutMaps {
  const Scan& scan;
  const Kernels& kernels;
  const Segments& segments;
  const int direction;  // 1: in scan order, -1: against it

  Maps maps;         // of each segment
  Rows late;         // see Kernels::summarize
  Rows entry, exit;  // the state that enters and that leaves each segment

  CutMaps(const Scan& scan, const Kernels& kernels, const Segments& segments, int direction);

  // Composes the maps of each sequence from its row of `states` [sequences, D], which becomes its last state. Sets `entry`,
  // and `exit` to the same, for the scan to update in place.
  void compose(void* states);

  // After the segments were scanned: writes the last state of each sequence to `states`. Returns false if a segment leaves
  // another state than the next one was given: then the call must be scanned whole.
  bool finish(void* states);

 private:
  // Calls f(i, next) for every segment in order; `next` is -1 if no segment of its sequence follows.
  template <class F>
  void for_segments(int64_t sequence, const F& f);
};

}  // namespace mru::cpu
