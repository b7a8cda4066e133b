// Checks that raise. No streams: torch's libraries export parts of libstdc++ of their own, and a stream that is put
// together from the parts of two libraries may end the process.
#pragma once
#include <concepts>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace mru {

inline std::string text(const char* part) { return part; }
inline std::string text(std::integral auto part) { return std::to_string(part); }
inline std::string text(double part) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%g", part);
  return buffer;
}

// A RuntimeError in Python, with what the parts say.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void throw_error(const Parts&... parts) {
  throw std::runtime_error((std::string() + ... + text(parts)));
}

}  // namespace mru

#define MRU_CHECK(condition, ...)      \
  do {                                 \
    if (!(condition)) [[unlikely]]     \
      ::mru::throw_error(__VA_ARGS__); \
  } while (false)
