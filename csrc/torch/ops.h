// The ops of every cell for a backend that is written in C++: forward, backward, step, step on slots and map.
//
// A backend is a type with
//   kInfo                                   its BackendInfo
//   forward<C>(scan, like), backward<C>(scan, like), map<C>(scan, factor, offset)
//                                           run cell C on the device of `like` or `factor`
#pragma once
#include <tuple>

#include "arguments.h"

namespace mru {

template <class Backend, class C>
Tensors forward(Tensors inputs, int64_t given, int64_t packed, std::vector<double> numbers,
                OptionalTensor initial_state, OptionalTensor cu_seqlens, OptionalTensor resets,
                OptionalTensor reset_state, bool reverse, int64_t chunk, int64_t segment, bool save) {
  BoundArguments bound(
      info_of<C>, Backend::kInfo,
      {inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, chunk, segment});
  Scan& scan = bound.scan;
  Tensors results{allocate_like(bound.streams[0]), bound.states(scan.sequences)};
  scan.h = stream_of(results[0]);
  scan.final_state = results[1].data_ptr();
  scan.save = save;
  if (save) {
    results.push_back(bound.rows(bound.total_checkpoint_rows, bound.state));
    scan.checkpoints = results.back().data_ptr();
  }
  if (save || bound.packs_codes) {  // without save, the scan itself uses the codes
    results.push_back(bound.rows(bound.total_code_rows, ScalarType::Int));
    if (bound.packs_codes) scan.codes = static_cast<int32_t*>(results.back().data_ptr());
  }
  Backend::template forward<C>(scan, results[0]);
  if (save) bound.clear_unused(results[2], results[3]);
  else results.resize(2, results[0]);
  return results;
}

// Allocates the gradients of the arrays in `inputs`, in their order, then those of the initial and the reset state, and
// binds them.
inline Tensors allocate_gradients(BoundArguments& bound, const Tensors& inputs, int64_t packed) {
  Scan& scan = bound.scan;
  Tensors grads, gates;
  if (packed != 0) {
    grads.push_back(allocate_like(bound.streams[0], std::popcount(uint64_t(packed))));
    gates = split_gates(grads[0], std::popcount(uint64_t(packed)));
  }
  size_t gate = 0;
  for (int i = 0; i < kMaxInputs; ++i) {
    if (bound.place[i] < 0) continue;
    if (bound.per_channel >> i & 1) {
      grads.push_back(allocate(inputs[bound.place[i]], {scan.channels}, bound.state));
      scan.grad_channel[i] = grads.back().data_ptr();
    } else if (packed >> i & 1) {
      scan.grad_in[i] = stream_of(gates[gate++]);
    } else {
      grads.push_back(allocate_like(bound.streams[bound.stream[i]]));
      scan.grad_in[i] = stream_of(grads.back());
    }
  }
  grads.push_back(bound.states(scan.sequences));
  scan.grad_initial = grads.back().data_ptr();
  if (bound.has_reset_state) {  // scan.reset_state of no sequences is null
    grads.push_back(bound.states(scan.sequences));
    scan.grad_reset_state = grads.back().data_ptr();
  }
  return grads;
}

template <class Backend, class C>
Tensors backward(Tensor grad_h, OptionalTensor grad_final, OptionalTensor grad_checkpoints, Tensors inputs,
                 int64_t given, int64_t packed, std::vector<double> numbers, OptionalTensor initial_state,
                 OptionalTensor cu_seqlens, OptionalTensor resets, OptionalTensor reset_state, bool reverse,
                 int64_t chunk, int64_t segment, OptionalTensor checkpoints, OptionalTensor codes, int64_t wanted) {
  BoundArguments bound(
      info_of<C>, Backend::kInfo,
      {inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, chunk, segment});
  Scan& scan = bound.scan;
  MRU_CHECK(grad_h.dim() == 3 && grad_h.size(0) == scan.batch && grad_h.size(1) == scan.time &&
                grad_h.size(2) == scan.channels,
            "grad_h: expected [", scan.batch, ", ", scan.time, ", ", scan.channels, "]");
  bound.expect_like(grad_h, "grad_h");
  grad_h = unit_channels(grad_h.scalar_type() == bound.type ? grad_h : torch::stable::to(grad_h, bound.type));
  scan.grad_h = stream_of(grad_h);
  scan.grad_final = bound.keep(grad_final ? bound.sequence_states(*grad_final, "grad_final") : bound.zero_states());
  if (!checkpoints && !codes) {
    const Tensors again = forward<Backend, C>(inputs, given, packed, numbers, initial_state, cu_seqlens, resets,
                                              reset_state, reverse, chunk, segment, /*save=*/true);
    checkpoints = again[2], codes = again[3];
  }
  MRU_CHECK(checkpoints && codes, "checkpoints, codes: expected both or neither");
  scan.checkpoints = bound.saved(*checkpoints, bound.total_checkpoint_rows, bound.state, "checkpoints");
  void* const rows = bound.saved(*codes, bound.total_code_rows, ScalarType::Int, "codes");
  if (bound.packs_codes) scan.codes = static_cast<int32_t*>(rows);
  if (grad_checkpoints)
    scan.grad_checkpoints =
        bound.saved(*grad_checkpoints, bound.total_checkpoint_rows, bound.state, "grad_checkpoints");
  Tensors grads = allocate_gradients(bound, inputs, packed);
  for (int i = 0; i < kMaxInputs; ++i)
    if (bound.place[i] >= 0 && (wanted >> bound.place[i] & 1) == 0) scan.wanted &= ~(1u << i);
  Backend::template backward<C>(scan, grad_h);

  // Of the states, those that are given have a gradient, in their own dtype.
  const auto own_dtype = [](Tensor grad, const Tensor& like) { return converted(grad, like.scalar_type()); };
  Tensors results;
  const size_t arrays = grads.size() - (reset_state ? 2 : 1);
  for (size_t i = 0; i < arrays; ++i) results.push_back(own_dtype(grads[i], inputs[i]));
  if (initial_state) results.push_back(own_dtype(grads[arrays], *initial_state));
  if (reset_state) results.push_back(own_dtype(grads[arrays + 1], *reset_state));
  return results;
}

// A single step, with fewer arguments than `forward`, because converting arguments takes longer than the step.
template <class Backend, class C>
std::tuple<Tensor, Tensor> step(Tensors inputs, int64_t given, int64_t packed, std::vector<double> numbers,
                                Tensor state) {
  const OptionalTensor initial = state, none;
  BoundArguments bound(
      info_of<C>, Backend::kInfo,
      {inputs, given, packed, numbers, initial, none, none, none, /*reverse=*/false, /*chunk=*/kCodesPerWord,
       /*segment=*/0, /*rank=*/2});
  Tensor h = bound.rows(bound.scan.batch, bound.type), after = bound.states(bound.scan.sequences);
  bound.scan.h = stream_of(h);
  bound.scan.final_state = after.data_ptr();
  Backend::template forward<C>(bound.scan, h);
  return {h, after};
}

// A single step on states in slots, which it updates in place.
template <class Backend, class C>
Tensor step_slots(Tensors inputs, int64_t given, int64_t packed, std::vector<double> numbers, Tensor state,
                  Tensor state_indices) {
  const OptionalTensor none;
  BoundArguments bound(
      info_of<C>, Backend::kInfo,
      {inputs, given, packed, numbers, none, none, none, none, /*reverse=*/false, /*chunk=*/kCodesPerWord,
       /*segment=*/0, /*rank=*/2});
  bound.bind_slots(state, state_indices);
  Tensor h = bound.rows(bound.scan.batch, bound.type);
  bound.scan.h = stream_of(h);
  Backend::template forward<C>(bound.scan, h);
  return h;
}

// The map of each whole sequence, s -> factor s + offset, both [N, D]. The factor of one with a reset is 0.
template <class Backend, class C>
std::tuple<Tensor, Tensor> map(Tensors inputs, int64_t given, int64_t packed, std::vector<double> numbers,
                               OptionalTensor cu_seqlens, OptionalTensor resets, OptionalTensor reset_state,
                               bool reverse, int64_t segment) {
  MRU_CHECK(info_of<C>.composes, "map: expected a cell whose steps compose; those of this one do not");
  const OptionalTensor none;
  BoundArguments bound(info_of<C>, Backend::kInfo,
                       {inputs, given, packed, numbers, none, cu_seqlens, resets, reset_state, reverse,
                        /*chunk=*/kCodesPerWord, segment});
  Tensor factor = bound.states(bound.scan.sequences), offset = bound.states(bound.scan.sequences);
  Backend::template map<C>(bound.scan, factor, offset);
  return {factor, offset};
}

// Registers the kernels of one cell. `m` is the library that STABLE_TORCH_LIBRARY_IMPL names.
template <class Backend, class C, class Library>
void implement(Library& m, const std::string& cell, const std::string& backend) {
  static_assert(C::inputs() <= kMaxInputs && C::scalars() <= kMaxScalars);
  m.impl((cell + "." + backend).c_str(), TORCH_BOX((&forward<Backend, C>)));
  m.impl((cell + "_backward." + backend).c_str(), TORCH_BOX((&backward<Backend, C>)));
  m.impl((cell + "_step." + backend).c_str(), TORCH_BOX((&step<Backend, C>)));
  m.impl((cell + "_step_slots." + backend).c_str(), TORCH_BOX((&step_slots<Backend, C>)));
  m.impl((cell + "_map." + backend).c_str(), TORCH_BOX((&map<Backend, C>)));
}

}  // namespace mru
