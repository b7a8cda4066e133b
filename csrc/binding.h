// From a torch call to a Scan and back: the same for every backend that is registered from C++.
// The schemas and the shapes of the results are stated in mru_kernels/ops.py.
#pragma once
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "expect.h"

// The message of the last error that torch reported in this thread. Torch has it from 2.13 on, so the symbol is weak.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace mru {

// Raises torch's own words, which users and tools look for ("out of memory", "can't allocate memory").
[[noreturn, gnu::cold, gnu::noinline]] inline void refuse_as_torch(const char* call) {
  const auto words = torch_exception_get_what_without_backtrace;
  const char* const said = words ? words() : nullptr;
  if (said && *said) refuse(said);
  refuse("torch: ", call, " failed");
}

}  // namespace mru

// Replace the check macros of torch's headers, which format with iostreams (see expect.h). Call sites omit the semicolon.
#undef TORCH_ERROR_CODE_CHECK
#undef STABLE_TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)          \
  {                                           \
    if ((call) != TORCH_SUCCESS) [[unlikely]] \
      ::mru::refuse_as_torch(#call);          \
  }
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "scan.h"

namespace mru {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// What the schemas of forward and backward have in common.
struct Call {
  const Tensors &streams, &channel;  // gates side by side in streams[0] if packed > 0
  const OptionalTensor &alpha, &initial_state, &cu_seqlens;
  double epsilon, surrogate_scale;
  bool reverse;
  int64_t packed, chunk, segment;
};

inline ScalarType state_type(ScalarType type) {
  const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
  return half ? ScalarType::Float : type;
}

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::ComplexFloat: return Dtype::kComplex64;
    case ScalarType::ComplexDouble: return Dtype::kComplex128;
    default: refuse("streams: expected float32, float64, bfloat16, float16, complex64 or complex128");
  }
}

constexpr int64_t kMostElements = int64_t(1) << 60;  // of a tensor: 64 bits address its bytes, whatever the dtype

// Kernels take any strides on batch and time but a unit stride on channels: other layouts are copied once.
inline Tensor unit_channels(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor as_state(const Tensor& t, ScalarType type) {
  if (t.scalar_type() != type) return torch::stable::contiguous(torch::stable::to(t, type));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);  // a call of torch costs as much as a short scan
}

inline int32_t device_type(const Tensor& t) {
  int32_t type = 0;
  aoti_torch_get_device_type(t.get(), &type);
  return type;
}

// Uninitialised, on the device of `like`; without the dispatcher, which costs more than a short scan.
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

// For the stream `t`, [B, T, gates D] or [B, D], in the layout that mru_kernels/ops.py states (`dense_like`).
inline Tensor allocate_like(const Tensor& t, int64_t gates = 1) {
  if (t.dim() == 2) return allocate(t, {t.size(0), t.size(1)}, t.scalar_type());
  const int64_t batch = t.size(0), time = t.size(1), channels = gates * t.size(2);
  const bool time_major = t.stride(1) > t.stride(0) && t.stride(0) > 0;
  if (!time_major) return allocate(t, {batch, time, channels}, t.scalar_type());
  const int64_t row = std::max<int64_t>(channels, 1);
  const int64_t sizes[] = {batch, time, channels}, strides[] = {row, std::max<int64_t>(batch, 1) * row, 1};
  return allocate(t, 3, sizes, strides, t.scalar_type());
}

// Of a tensor [B, T, D], or [B, D] for a single step. The stride of a dimension of size 1 may be any number.
inline Stream stream_of(const Tensor& t) {
  const auto stride = [&](int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; };
  return {t.data_ptr(), stride(0), t.dim() == 3 ? stride(1) : 0};
}

inline double epsilon_of(const Tensor& t) {
  MRU_EXPECT(t.is_cpu() && t.numel() == 1 && t.scalar_type() == ScalarType::Double,
             "epsilon: expected one float64 value on the CPU");
  return *static_cast<const double*>(t.data_ptr());
}

// The gates of a packed tensor [B, T, k D], as k views [B, T, D].
inline Tensors split_gates(Tensor gates, int64_t k) {
  const int64_t channels = gates.size(2) / k;
  Tensors views;
  for (int64_t i = 0; i < k; ++i) views.push_back(torch::stable::narrow(gates, 2, i * channels, channels));
  return views;
}

// A Scan and the tensors that it points into. Everything that a kernel relies on is checked here; the public functions
// of the package put what they can into the words of their own arguments.
class Bound {
 public:
  Scan scan{};
  Tensors streams;  // one view per gate
  ScalarType type, state;

  // `most_chunk`: the longest chunk that the backend takes. `rank`: 3, or 2 for streams that are a single step.
  Bound(CellKind cell, int64_t most_chunk, const Call& call, int64_t rank = 3) {
    MRU_EXPECT(!call.streams.empty(), "streams: expected at least one tensor");
    MRU_EXPECT(call.packed == 0 || (call.packed > 0 && call.packed <= kMaxInputs && call.streams.size() == 1),
               "packed: expected the number of gates in one tensor, got ", call.packed, ", ", call.streams.size(),
               " tensors");
    const size_t inputs = (call.packed > 0 ? call.packed : call.streams.size()) + call.channel.size();
    MRU_EXPECT(inputs <= kMaxInputs, "streams, channel: expected the inputs of the cell, got ", inputs);
    device_type_ = device_type(call.streams[0]), device_index_ = call.streams[0].get_device_index();
    streams.reserve(kMaxInputs);
    kept_.reserve(8);
    for (const Tensor& t : call.streams) {
      MRU_EXPECT(t.dim() == rank, "streams: expected ", rank == 3 ? "[batch, time, channels]" : "[batch, channels]",
                 ", got ", t.dim(), " dimensions");
      expect_device(t, "streams");
      streams.push_back(unit_channels(t));
    }
    if (call.packed > 0) {
      MRU_EXPECT(streams[0].size(2) % call.packed == 0, "packed: expected to divide ", streams[0].size(2),
                 " channels, got ", call.packed);
      streams = split_gates(streams[0], call.packed);
    }
    const Tensor& first = streams[0];
    type = first.scalar_type();
    state = state_type(type);
    scan.cell = cell;
    scan.dtype = dtype_of(type);
    scan.batch = first.size(0), scan.time = rank == 3 ? first.size(1) : 1, scan.channels = first.size(rank - 1);
    // Sizes of 0 count as 1: strides are products of the other sizes.
    const auto size = [](int64_t n) { return double(std::max<int64_t>(n, 1)); };
    MRU_EXPECT(size(scan.batch) * size(scan.time) * size(scan.channels) <= double(kMostElements),
               "streams: expected a size that 64 bits can address");
    MRU_EXPECT(call.surrogate_scale > 0 && call.surrogate_scale < std::numeric_limits<double>::infinity(),
               "surrogate_scale: expected a positive finite number, got ", call.surrogate_scale);
    scan.reverse = call.reverse, scan.chunk = call.chunk, scan.segment = call.segment;
    scan.surrogate_scale = call.surrogate_scale;
    scan.epsilon = call.epsilon;
    MRU_EXPECT(scan.epsilon >= 0 && scan.epsilon <= 1, "epsilon: expected a value in [0, 1], got ", scan.epsilon);
    MRU_EXPECT(scan.chunk > 0 && scan.chunk <= most_chunk && scan.chunk % kEventsPerWord == 0,
               "chunk: expected a positive multiple of 16 up to ", most_chunk, ", got ", scan.chunk);
    MRU_EXPECT(scan.segment >= 0 && scan.segment <= kMostElements && scan.segment % scan.chunk == 0,
               "segment: expected 0 or a positive multiple of the chunk ", scan.chunk, " up to 2^60, got ",
               scan.segment);

    // Gate inputs in the cell's order: the first stream, the inputs that come per channel, the other streams.
    const unsigned per_channel = ((1u << call.channel.size()) - 1) << 1;
    MRU_EXPECT(takes(cell, scan.dtype, int(inputs), per_channel),
               "streams, channel: expected the inputs of the cell, got ", streams.size(), " and ", call.channel.size());
    MRU_EXPECT(!call.alpha || !is_complex(scan.dtype), "alpha: expected none with complex streams");
    scan.inputs = int(inputs);
    for (size_t i = 0; i < inputs; ++i) {
      const size_t channel = i - 1, after = i - call.channel.size();
      if (i > 0 && channel < call.channel.size()) {
        scan.in[i].channel = keep(vector(call.channel[channel], "channel"));
      } else {
        const Tensor& t = streams[i == 0 ? 0 : after];
        MRU_EXPECT(t.scalar_type() == type && t.sizes().equals(first.sizes()), "streams: expected one dtype and shape");
        scan.in[i].stream = stream_of(t);
      }
    }
    if (call.alpha) scan.alpha = keep(vector(*call.alpha, "alpha"));
    scan.sequences = scan.batch;
    if (call.cu_seqlens) {
      expect_device(*call.cu_seqlens, "cu_seqlens");
      const ScalarType offset = call.cu_seqlens->scalar_type();
      MRU_EXPECT(call.cu_seqlens->dim() == 1 && call.cu_seqlens->numel() > 0 &&
                     (offset == ScalarType::Int || offset == ScalarType::Long),
                 "cu_seqlens: expected int32 or int64 [sequences + 1]");
      MRU_EXPECT(scan.batch == 1, "cu_seqlens: expected streams of batch 1, got ", scan.batch);
      scan.sequences = call.cu_seqlens->numel() - 1;
      MRU_EXPECT(size(scan.sequences) * size(scan.channels) <= double(kMostElements),
                 "cu_seqlens: expected a number of sequences that 64 bits can address");
      scan.offsets = static_cast<const int64_t*>(keep(as_state(*call.cu_seqlens, ScalarType::Long)));
    }
    if (call.initial_state) scan.initial = keep(sequence_states(*call.initial_state, "initial_state"));
    scan.checkpoint_rows = scan.time > 0 ? (scan.time - 1) / scan.chunk : 0;
    scan.event_rows = scan.time / kEventsPerWord + (scan.offsets ? scan.sequences : 1);
  }

  // Where write events fit 2 bits and are worth packing: several segments scan the sequence at once.
  bool packs_events(bool cell_has_events) const { return cell_has_events && scan.segment > 0; }

  // A tensor [sequences, D], in the state dtype.
  Tensor sequence_states(const Tensor& t, const char* name) const {
    MRU_EXPECT(t.dim() == 2 && t.size(0) == scan.sequences && t.size(1) == scan.channels, name, ": expected [",
               scan.sequences, ", ", scan.channels, "]");
    return parameter(t, name);
  }
  // What the forward pass saved, [B, rows, D].
  void* saved(const Tensor& t, int64_t rows, ScalarType as, const char* name) {
    MRU_EXPECT(t.dim() == 3 && t.size(0) == scan.batch && t.size(1) == rows && t.size(2) == scan.channels &&
                   t.scalar_type() == as,
               name, ": expected [", scan.batch, ", ", rows, ", ", scan.channels, "] as the forward pass made it");
    expect_device(t, name);
    return const_cast<void*>(keep(torch::stable::contiguous(t)));
  }
  void expect_device(const Tensor& t, const char* name) const {
    MRU_EXPECT(device_type(t) == device_type_ && t.get_device_index() == device_index_, name,
               ": expected the streams' device");
  }
  void expect_like(const Tensor& t, const char* name) const {
    expect_device(t, name);
    const ScalarType own = t.scalar_type();
    MRU_EXPECT(own == type || own == state || (own == ScalarType::Float && !is_complex(scan.dtype)), name,
               ": expected the streams' dtype, the state dtype or, for real streams, float32");
  }

  Tensor states(int64_t rows) const { return allocate(streams[0], {rows, scan.channels}, state); }
  Tensor rows(int64_t rows, ScalarType as) const { return allocate(streams[0], {scan.batch, rows, scan.channels}, as); }
  const void* keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back().data_ptr();
  }

 private:
  // A tensor [D], in the state dtype.
  Tensor vector(const Tensor& t, const char* name) const {
    MRU_EXPECT(t.dim() == 1 && t.size(0) == scan.channels, name, ": expected [", scan.channels, "]");
    return parameter(t, name);
  }
  Tensor parameter(const Tensor& t, const char* name) const {
    expect_like(t, name);
    return as_state(t, state);
  }

  int32_t device_type_, device_index_;
  Tensors kept_;
};

// A backend is a type with static void forward(Scan), static void backward(Scan) that launch on a tensor's device, and
// with kMostChunk, the longest chunk that they take.
template <class Backend, CellKind kCell>
Tensors forward(Tensors streams, Tensors channel, OptionalTensor alpha, OptionalTensor initial_state,
                OptionalTensor cu_seqlens, Tensor epsilon, double surrogate_scale, bool reverse, int64_t packed,
                int64_t chunk, int64_t segment, bool save) {
  Bound bound(kCell, Backend::kMostChunk,
              {streams, channel, alpha, initial_state, cu_seqlens, epsilon_of(epsilon), surrogate_scale, reverse,
               packed, chunk, segment});
  Scan& scan = bound.scan;
  const bool events = bound.packs_events(has_events(kCell, scan.inputs));
  Tensors results{allocate_like(bound.streams[0]), bound.states(scan.sequences)};
  scan.h = stream_of(results[0]);
  scan.final_state = results[1].data_ptr();
  scan.save = save;
  if (save) {
    results.push_back(bound.rows(scan.checkpoint_rows, bound.state));
    scan.checkpoints = results.back().data_ptr();
  }
  if (save || events) {  // the scan itself needs them too
    results.push_back(bound.rows(events ? scan.event_rows : 0, ScalarType::Int));
    if (events) scan.events = static_cast<int32_t*>(results.back().data_ptr());
  }
  Backend::forward(scan, results[0]);
  if (!save) results.resize(2, results[0]);
  return results;
}

// Gradients of: each stream (or the packed gates), each per-channel input, alpha if given, initial_state if given.
template <class Backend, CellKind kCell>
Tensors backward(Tensor grad_h, Tensor grad_final, Tensors streams, Tensors channel, OptionalTensor alpha,
                 OptionalTensor initial_state, OptionalTensor cu_seqlens, Tensor epsilon, double surrogate_scale,
                 bool reverse, int64_t packed, int64_t chunk, int64_t segment, Tensor checkpoints, Tensor events) {
  Bound bound(kCell, Backend::kMostChunk,
              {streams, channel, alpha, initial_state, cu_seqlens, epsilon_of(epsilon), surrogate_scale, reverse,
               packed, chunk, segment});
  Scan& scan = bound.scan;
  MRU_EXPECT(grad_h.dim() == 3 && grad_h.size(0) == scan.batch && grad_h.size(1) == scan.time &&
                 grad_h.size(2) == scan.channels,
             "grad_h: expected [", scan.batch, ", ", scan.time, ", ", scan.channels, "]");
  bound.expect_like(grad_h, "grad_h");
  grad_h = unit_channels(grad_h.scalar_type() == bound.type ? grad_h : torch::stable::to(grad_h, bound.type));
  scan.grad_h = stream_of(grad_h);
  scan.grad_final = bound.keep(bound.sequence_states(grad_final, "grad_final"));
  scan.checkpoints = bound.saved(checkpoints, scan.checkpoint_rows, bound.state, "checkpoints");
  const bool has = bound.packs_events(has_events(kCell, scan.inputs));
  void* const rows = bound.saved(events, has ? scan.event_rows : 0, ScalarType::Int, "events");
  if (has) scan.events = static_cast<int32_t*>(rows);

  Tensors grads, views;
  if (packed > 0) {
    grads.push_back(allocate_like(bound.streams[0], packed));
    views = split_gates(grads[0], packed);
  } else {
    for (const Tensor& t : bound.streams) grads.push_back(allocate_like(t));
    views = grads;
  }
  const auto per_channel = [&](const Tensor& like, void*& into) {
    grads.push_back(allocate(like, {scan.channels}, bound.state));
    into = grads.back().data_ptr();
  };
  const size_t first_channel = grads.size();
  for (size_t i = 0; i < channel.size(); ++i) per_channel(channel[i], scan.grad_channel[1 + i]);
  for (size_t i = 0; i < views.size(); ++i) scan.grad_in[i == 0 ? 0 : i + channel.size()] = stream_of(views[i]);
  if (alpha) per_channel(*alpha, scan.grad_alpha);
  Tensor grad_initial = bound.states(scan.sequences);
  scan.grad_initial = grad_initial.data_ptr();
  if (initial_state) grads.push_back(grad_initial);
  Backend::backward(scan, grad_h);

  const auto cast = [](Tensor& grad, const Tensor& like) {
    if (grad.scalar_type() != like.scalar_type()) grad = torch::stable::to(grad, like.scalar_type());
  };
  for (size_t i = 0; i < channel.size(); ++i) cast(grads[first_channel + i], channel[i]);
  if (alpha) cast(grads[first_channel + channel.size()], *alpha);
  if (initial_state) cast(grads.back(), *initial_state);
  return grads;
}

// A single step, in fewer and simpler arguments than `forward`: they cost more than the step does.
template <class Backend, CellKind kCell>
std::tuple<Tensor, Tensor> step(Tensor first, OptionalTensor second, OptionalTensor third, OptionalTensor alpha,
                                Tensor state, double epsilon) {
  Tensors streams, channel;
  streams.reserve(kMaxInputs);
  streams.push_back(first);
  MRU_EXPECT(second || !third, "second: expected a tensor beside the third");
  for (const OptionalTensor& t : {std::cref(second), std::cref(third)}) {
    if (!t) continue;
    const bool per_channel = t->dim() == 1;
    MRU_EXPECT(!per_channel || streams.size() == 1, "third: expected [batch, channels] after another stream, got [",
               t->size(0), "]");
    (per_channel ? channel : streams).push_back(*t);
  }
  Bound bound(kCell, Backend::kMostChunk,
              {streams, channel, alpha, state, /*cu_seqlens=*/{}, epsilon, /*surrogate_scale=*/1, /*reverse=*/false,
               /*packed=*/0, /*chunk=*/kEventsPerWord, /*segment=*/0},
              /*rank=*/2);
  Tensor h = allocate_like(bound.streams[0]), after = bound.states(bound.scan.sequences);
  bound.scan.h = stream_of(h);
  bound.scan.final_state = after.data_ptr();
  Backend::forward(bound.scan, h);
  return {h, after};
}

// The ops of a cell for a backend. `m` is what STABLE_TORCH_LIBRARY_IMPL gives.
template <class Backend, CellKind kCell, class Library>
void implement(Library& m, const std::string& cell, const std::string& backend) {
  m.impl((cell + "." + backend).c_str(), TORCH_BOX((&forward<Backend, kCell>)));
  m.impl((cell + "_backward." + backend).c_str(), TORCH_BOX((&backward<Backend, kCell>)));
  m.impl((cell + "_step." + backend).c_str(), TORCH_BOX((&step<Backend, kCell>)));
}
template <class Backend, class Library>
void implement_cells(Library& m, const std::string& backend) {
  implement<Backend, CellKind::kBmru>(m, "bmru", backend);
  implement<Backend, CellKind::kSchmitt>(m, "schmitt", backend);
  implement<Backend, CellKind::kLinear>(m, "linear_recurrence", backend);
}

}  // namespace mru
