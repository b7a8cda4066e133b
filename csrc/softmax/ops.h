// The ops of the softmax recurrence for a backend that is written in C++. mru_kernels/softmax/layout.py computes the shapes
// of the results for fakes: keep both equal.
//
// A backend is a type with
//   kMostChunk                          the longest chunk that its kernels support
//   segment(sizes)                      from HeadSizes, its choice of segment, for calls with segment -1
//   forward(scan, like), backward(scan, like)
//                                       run a HeadScan on the device of `like`
#pragma once
#include "../segment.h"
#include "../torch/tensors.h"
#include "scan.h"

namespace mru::softmax {

struct HeadSizes : Sizes {
  int64_t heads;
};

struct Arguments {
  const Tensor& score;
  const OptionalTensor& value;
  int64_t heads;
  const OptionalTensor &decay, &bonus, &initial_state, &cu_seqlens;
  bool reverse;
  int64_t chunk, segment;
};

// A HeadScan and the tensors that it points into. It checks everything that a kernel relies on. The errors name the arguments
// of the op.
class BoundHeads {
 public:
  HeadScan scan{};
  Tensor first;            // the argument `score`: the scores, or both streams in one
  Tensor score, value;     // views [B, T, H] and [B, T, D] with unit stride on the last dimension
  OptionalTensor decays;   // the same [B, T, H], if the decay is a stream
  ScalarType type, state;  // dtype of streams; dtype of states

  template <class Backend>
  BoundHeads(Backend, const Arguments& arguments) : first(unit_channels(arguments.score)), score(first), value(first) {
    MRU_CHECK(arguments.score.dim() == 3, "score: expected 3 dimensions, got ", arguments.score.dim());
    kept_.reserve(8);
    bind_streams(arguments);
    bind_heads(arguments);
    bind_sequences(arguments);
    scan.reverse = arguments.reverse, scan.chunk = arguments.chunk;
    MRU_CHECK(scan.chunk > 0 && scan.chunk <= Backend::kMostChunk && scan.chunk % 16 == 0,
              "chunk: expected a positive multiple of 16 up to ", Backend::kMostChunk, ", got ", scan.chunk);
    MRU_CHECK(arguments.segment >= -1 && arguments.segment <= kMostElements,
              "segment: expected -1 for the backend's own choice, 0 or a number of steps up to 2^60, got ",
              arguments.segment);
    const HeadSizes sizes{{scan.sequences, scan.batch * scan.time, scan.channels, element_bytes(scan.dtype)},
                          scan.heads};
    const int64_t segment = arguments.segment < 0 ? Backend::segment(sizes) : arguments.segment;
    scan.segment = ceil_div(segment, scan.chunk) * scan.chunk;
    scan.checkpoint_rows = scan.time > 0 ? (scan.time - 1) / scan.chunk : 0;
  }

  int64_t columns() const { return scan.channels + 2 * scan.heads; }
  Tensor states(int64_t rows) const { return allocate(score, {rows, columns()}, state); }
  Tensor borders() const { return allocate(score, {scan.batch, scan.checkpoint_rows, columns()}, state); }

  // The data of a tensor of this shape in the state dtype, checked and copied if need be.
  void* bind(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
    expect(t, shape, name);
    const ScalarType own = t.scalar_type();
    MRU_CHECK(own == type || own == state || own == ScalarType::Float, name,
              ": expected the streams' dtype, the state dtype or float32");
    kept_.push_back(as_state(t, state));
    return kept_.back().data_ptr();
  }
  // A stream of this shape in the dtype `type`, with unit stride on the last dimension.
  Stream bind_stream(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
    expect(t, shape, name);
    kept_.push_back(unit_channels(t.scalar_type() == type ? t : torch::stable::to(t, type)));
    return stream_of(kept_.back());
  }

 private:
  static double size(int64_t n) { return double(std::max<int64_t>(n, 1)); }

  void expect(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) const {
    bool fits = t.dim() == int64_t(shape.size());
    std::string sizes;
    for (size_t i = 0; i < shape.size(); ++i) {
      fits = fits && t.size(i) == shape.begin()[i];
      sizes += (i ? ", " : "") + std::to_string(shape.begin()[i]);
    }
    MRU_CHECK(fits, name, ": expected [", sizes.c_str(), "]");
    MRU_CHECK(device_type(t) == device_type(score) && t.get_device_index() == score.get_device_index(), name,
              ": expected the score's device");
  }

  // Binds score and value, which set the sizes, the dtype and the device of the call.
  void bind_streams(const Arguments& arguments) {
    type = first.scalar_type();
    state = state_type(type);
    scan.dtype = dtype_of(type), scan.state = dtype_of(state);
    MRU_CHECK(!is_complex(scan.dtype), "score: expected float32, float64, bfloat16 or float16");
    if (arguments.value) {
      MRU_CHECK(arguments.value->dim() == 3 && arguments.value->scalar_type() == type,
                "value: expected [batch, time, channels] in the score's dtype");
      value = unit_channels(*arguments.value);
    } else {
      const int64_t heads = arguments.heads, all = first.size(2);
      MRU_CHECK(0 <= heads && heads <= all, "heads: expected 0 to ", all, " of the gates, got ", heads);
      score = torch::stable::narrow(first, 2, 0, heads);
      value = torch::stable::narrow(first, 2, heads, all - heads);
    }
    scan.batch = score.size(0), scan.time = score.size(1);
    scan.heads = score.size(2), scan.channels = value.size(2);
    expect(value, {scan.batch, scan.time, scan.channels}, "value");
    MRU_CHECK(scan.heads ? scan.channels % scan.heads == 0 && scan.channels >= scan.heads : scan.channels == 0,
              "value: expected channels that ", scan.heads, " heads divide, one or more each, got ", scan.channels);
    MRU_CHECK(size(scan.batch) * size(scan.time) * size(columns()) <= double(kMostElements),
              "score: expected a size that 64 bits can address");
    scan.in[kScore].stream = stream_of(score);
    scan.in[kValue].stream = stream_of(value);
  }

  void bind_heads(const Arguments& arguments) {
    if (arguments.bonus) scan.in[kBonus].channel = bind(*arguments.bonus, {scan.heads}, "bonus");
    if (!arguments.decay) return;
    const Tensor& t = *arguments.decay;
    if (t.dim() == 1) {
      scan.in[kDecay].channel = bind(t, {scan.heads}, "decay");
      return;
    }
    MRU_CHECK(t.scalar_type() == type, "decay: expected the score's dtype");
    expect(t, {scan.batch, scan.time, scan.heads}, "decay");
    decays = unit_channels(t);
    scan.in[kDecay].stream = stream_of(*decays);
  }

  void bind_sequences(const Arguments& arguments) {
    scan.sequences = scan.batch;
    if (arguments.cu_seqlens) {
      const Tensor& t = *arguments.cu_seqlens;
      const ScalarType offset = t.scalar_type();
      MRU_CHECK(t.dim() == 1 && t.numel() > 0 && (offset == ScalarType::Int || offset == ScalarType::Long),
                "cu_seqlens: expected int32 or int64 [sequences + 1]");
      expect(t, {t.numel()}, "cu_seqlens");
      MRU_CHECK(scan.batch == 1, "cu_seqlens: expected streams of batch 1, got ", scan.batch);
      scan.sequences = t.numel() - 1;
      kept_.push_back(as_state(t, ScalarType::Long));
      scan.offsets = static_cast<const int64_t*>(kept_.back().data_ptr());
    }
    MRU_CHECK(size(scan.sequences) * size(columns()) <= double(kMostElements),
              "cu_seqlens: expected a number of sequences that 64 bits can address");
    if (arguments.initial_state)
      scan.initial = bind(*arguments.initial_state, {scan.sequences, columns()}, "initial_state");
  }

  Tensors kept_;
};

template <class Backend>
Tensors forward(Tensor score, OptionalTensor value, int64_t heads, OptionalTensor decay, OptionalTensor bonus,
                OptionalTensor initial_state, OptionalTensor cu_seqlens, bool reverse, int64_t chunk, int64_t segment,
                bool save) {
  BoundHeads bound(Backend{}, {score, value, heads, decay, bonus, initial_state, cu_seqlens, reverse, chunk, segment});
  HeadScan& scan = bound.scan;
  Tensors results{allocate_like(bound.value), bound.states(scan.sequences)};
  scan.h = stream_of(results[0]);
  scan.final_state = results[1].data_ptr();
  if (save) {
    results.push_back(bound.borders());
    scan.checkpoints = results[2].data_ptr();
  }
  Backend::forward(scan, results[0]);
  return results;
}

// Binds the gradients of score and value, as one tensor if they came as one.
inline void allocate_gradients(BoundHeads& bound, bool is_packed, Tensors& grads) {
  HeadScan& scan = bound.scan;
  if (is_packed) {
    Tensor both = allocate_like(bound.first);
    scan.grad_in[kScore] = stream_of(torch::stable::narrow(both, 2, 0, scan.heads));
    scan.grad_in[kValue] = stream_of(torch::stable::narrow(both, 2, scan.heads, scan.channels));
    grads.push_back(both);
  } else {
    for (const Tensor& t : {bound.score, bound.value}) grads.push_back(allocate_like(t));
    scan.grad_in[kScore] = stream_of(grads[0]);
    scan.grad_in[kValue] = stream_of(grads[1]);
  }
  if (bound.decays) {
    grads.push_back(allocate_like(*bound.decays));
    scan.grad_in[kDecay] = stream_of(grads.back());
  }
  for (const int input : {int(kDecay), int(kBonus)}) {
    if (!scan.in[input].channel) continue;
    grads.push_back(allocate(bound.score, {scan.heads}, bound.state));
    scan.grad_channel[input] = grads.back().data_ptr();
  }
}

template <class Backend>
Tensors backward(Tensor grad_y, Tensor grad_final, Tensor score, OptionalTensor value, int64_t heads,
                 OptionalTensor decay, OptionalTensor bonus, OptionalTensor initial_state, OptionalTensor cu_seqlens,
                 bool reverse, int64_t chunk, int64_t segment, Tensor borders) {
  BoundHeads bound(Backend{}, {score, value, heads, decay, bonus, initial_state, cu_seqlens, reverse, chunk, segment});
  HeadScan& scan = bound.scan;
  scan.grad_h = bound.bind_stream(grad_y, {scan.batch, scan.time, scan.channels}, "grad_y");
  scan.grad_final = bound.bind(grad_final, {scan.sequences, bound.columns()}, "grad_final");
  scan.checkpoints = bound.bind(borders, {scan.batch, scan.checkpoint_rows, bound.columns()}, "borders");
  Tensors grads;
  allocate_gradients(bound, !value, grads);
  Tensor of_initial = bound.states(scan.sequences);
  scan.grad_initial = of_initial.data_ptr();
  Backend::backward(scan, grads[0]);

  const auto own_dtype = [](Tensor grad, const Tensor& like) {
    return grad.scalar_type() == like.scalar_type() ? grad : torch::stable::to(grad, like.scalar_type());
  };
  size_t next = value ? 2 : 1;
  for (const OptionalTensor* t : {&decay, &bonus}) {
    if (!*t) continue;
    grads[next] = own_dtype(grads[next], **t);
    ++next;
  }
  if (initial_state) grads.push_back(own_dtype(of_initial, *initial_state));
  return grads;
}

// `m` is the library that STABLE_TORCH_LIBRARY_IMPL names.
template <class Backend, class Library>
void implement(Library& m, const std::string& backend) {
  m.impl(("softmax_recurrence." + backend).c_str(), TORCH_BOX(&forward<Backend>));
  m.impl(("softmax_recurrence_backward." + backend).c_str(), TORCH_BOX(&backward<Backend>));
}

}  // namespace mru::softmax
