// Tensors of torch's stable ABI: dtypes, layouts, allocation.
#pragma once
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../check.h"

// The message of the last error that torch reported in this thread. Torch has it from 2.13 on, so the symbol is weak.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace mru {

// Raises with torch's own message, which users and tools look for ("out of memory", "can't allocate memory").
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_as_torch(const char* call) {
  const auto words = torch_exception_get_what_without_backtrace;
  const char* const message = words ? words() : nullptr;
  if (message && *message) throw_error(message);
  throw_error("torch: ", call, " failed");
}

}  // namespace mru

// Replace the check macros of torch's headers, which format with iostreams (see check.h). Call sites omit the semicolon. No other
// file includes torch's headers: the linker keeps one of their inline functions, whichever macros it was compiled with.
#undef TORCH_ERROR_CODE_CHECK
#undef STABLE_TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)          \
  {                                           \
    if ((call) != TORCH_SUCCESS) [[unlikely]] \
      ::mru::throw_as_torch(#call);           \
  }
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../scan.h"

namespace mru {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

inline ScalarType state_type(ScalarType type) {
  const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
  return half ? ScalarType::Float : type;
}

inline ScalarType complex_type(ScalarType real) {
  return real == ScalarType::Double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
}
inline bool is_complex(ScalarType type) {
  return type == ScalarType::ComplexFloat || type == ScalarType::ComplexDouble;
}

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::ComplexFloat: return Dtype::kComplex64;
    case ScalarType::ComplexDouble: return Dtype::kComplex128;
    default: throw_error("inputs[0]: expected float32, float64, bfloat16, float16, complex64 or complex128");
  }
}

constexpr int64_t kMostElements = int64_t(1) << 60;  // of a tensor: 64 bits address its bytes, whatever the dtype

// Kernels take any strides on batch and time and a unit stride on channels; other layouts are copied once.
inline Tensor unit_channels(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor as_state(const Tensor& t, ScalarType type) {
  if (t.scalar_type() != type) return torch::stable::contiguous(torch::stable::to(t, type));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);  // a call of torch costs as much as a short scan
}

// `t` in a dtype; of a complex tensor, a real dtype takes the real part.
inline Tensor converted(Tensor t, ScalarType type) {
  if (is_complex(t.scalar_type()) && !is_complex(type)) {
    std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
    TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("aten::real", "", stack.data()))
    t = torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
  }
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline int32_t device_type(const Tensor& t) {
  int32_t type = 0;
  aoti_torch_get_device_type(t.get(), &type);
  return type;
}

// An uninitialised tensor on the device of `like`. It bypasses the dispatcher, which costs more than a short scan.
inline Tensor allocate(const Tensor& like, size_t rank, const int64_t* sizes, const int64_t* strides, ScalarType type) {
  AtenTensorHandle handle = nullptr;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides, dtype, device_type(like), like.get_device_index(), &handle));
  return Tensor(handle);
}

// The same, contiguous.
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[3];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  return allocate(like, sizes.size(), sizes.begin(), strides, type);
}

// An uninitialised tensor [B, T, gates D] for a stream [B, T, D], or [B, D], in the layout of `dense_like` in mru_kernels/ops.
inline Tensor allocate_like(const Tensor& t, int64_t gates = 1) {
  if (t.dim() == 2) return allocate(t, {t.size(0), t.size(1)}, t.scalar_type());
  const int64_t batch = t.size(0), time = t.size(1), channels = gates * t.size(2);
  const bool time_major = t.stride(1) > t.stride(0) && t.stride(0) > 0;
  if (!time_major) return allocate(t, {batch, time, channels}, t.scalar_type());
  const int64_t row = std::max<int64_t>(channels, 1);
  const int64_t sizes[] = {batch, time, channels}, strides[] = {row, std::max<int64_t>(batch, 1) * row, 1};
  return allocate(t, 3, sizes, strides, t.scalar_type());
}

// The stream of a tensor [B, T, D], or [B, D] for a single step. A dimension of size 1 may have any stride, so it counts as 0.
inline Stream stream_of(const Tensor& t) {
  const auto stride = [&](int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; };
  return {t.data_ptr(), stride(0), t.dim() == 3 ? stride(1) : 0};
}

// A scheduled scalar, which may change between calls.
inline double scalar_of(const Tensor& t) {
  MRU_CHECK(t.is_cpu() && t.numel() == 1 && t.scalar_type() == ScalarType::Double,
            "inputs: expected a scalar as one float64 value on the CPU");
  return *static_cast<const double*>(t.data_ptr());
}

// The gates of a packed tensor [B, T, k D], as k views [B, T, D].
inline Tensors split_gates(Tensor gates, int64_t k) {
  const int64_t channels = gates.size(2) / k;
  Tensors views;
  for (int64_t i = 0; i < k; ++i) views.push_back(torch::stable::narrow(gates, 2, i * channels, channels));
  return views;
}

}  // namespace mru
