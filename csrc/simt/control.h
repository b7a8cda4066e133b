// What the modules of host executions share: memory that starts as NaN, and the functions with which tests set the scheduler
// and count the traffic.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>

#include "../check.h"
#include "../scan.h"
#include "simt.h"

namespace simt {

inline void poison(void* p, int64_t bytes) {
  if (p && bytes > 0) std::memset(p, kNanByte, bytes);
}
// width: elements of a row of the stream
inline void poison(const mru::Scan& scan, const mru::Stream& stream, int64_t width) {
  const int64_t size = mru::element_bytes(scan.dtype);
  if (!stream.data) return;
  for (int64_t b = 0; b < scan.batch; ++b)
    for (int64_t t = 0; t < scan.time; ++t)
      poison(static_cast<char*>(stream.data) + (b * stream.batch + t * stream.time) * size, width * size);
}

// Calls run(workspace) with a workspace of the exact size, so that the address sanitizer sees an access beyond its end.
template <class Run>
void launch(int64_t bytes, Run run) {
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::malloc(bytes), &std::free);
  poison(workspace.get(), bytes);
  const char* const error = run(workspace.get());
  MRU_CHECK(!error, "simt: ", error ? error : "");
}

inline std::map<std::string, std::array<uint64_t, 2>> traffic() {
  constexpr const char* names[kKinds] = {"stream", "codes", "state", "index", "mask"};
  std::map<std::string, std::array<uint64_t, 2>> all;
  for (int i = 0; i < kKinds; ++i) all[names[i]] = {control.read[i], control.written[i]};
  return all;
}

inline void bind_control(pybind11::module_& m) {
  m.def("traffic", &traffic, "Bytes read and written since the last reset, by kind.");
  m.def("launches", [] { return control.launches; }, "Kernels launched since the last reset.");
  m.def("reset_traffic", [] {
    control.launches = 0;
    for (int i = 0; i < kKinds; ++i) control.read[i] = control.written[i] = 0;
  });
  m.def(
      "configure",
      [](uint64_t seed, unsigned resident, uint64_t budget, int most_shared) {
        control.seed = seed, control.resident = resident, control.budget = budget;
        control.most_shared = most_shared;
      },
      pybind11::arg("seed") = 1, pybind11::arg("resident") = 24, pybind11::arg("budget") = 20'000'000,
      pybind11::arg("most_shared") = 163 << 10);
}

}  // namespace simt
