#include "cut_maps.h"

#include <cstring>

namespace mru::cpu {

CutMaps::CutMaps(const Scan& scan, const Kernels& kernels, const Segments& segments, int direction)
    : scan(scan),
      kernels(kernels),
      segments(segments),
      direction(direction),
      maps(scan, segments.count()),
      late(scan, segments.count(), state_bytes(scan) / (is_complex(scan.state) ? 2 : 1)),
      entry(scan, segments.count()),
      exit(scan, segments.count()) {}

template <class F>
void CutMaps::for_segments(int64_t sequence, const F& f) {
  const int64_t first = segments.first[sequence], end = segments.first[sequence + 1];
  for (int64_t i = direction > 0 ? first : end - 1; first <= i && i < end; i += direction) {
    const int64_t next = i + direction;
    f(i, first <= next && next < end ? next : -1);
  }
}

void CutMaps::compose(void* states) {
  for (int64_t n = 0; n < scan.sequences; ++n) {
    void* const state = row(states, scan, n);
    for_segments(n, [&](int64_t i, int64_t) {
      std::memcpy(entry.at(i), state, row_bytes(scan));
      kernels.apply(scan.channels, kernels.overwrites(scan), maps.at(i), state);
    });
  }
  exit = entry;
}

bool CutMaps::finish(void* states) {
  bool all = true;
  for (int64_t n = 0; n < scan.sequences; ++n)
    for_segments(n, [&](int64_t i, int64_t next) {
      if (next < 0) std::memcpy(row(states, scan, n), exit.at(i), row_bytes(scan));
      else
        all = all && kernels.consistent(scan.channels, kernels.overwrites(scan), maps.at(i), late.at(i), entry.at(i),
                                        exit.at(i), entry.at(next));
    });
  return all;
}

}  // namespace mru::cpu
