// From the arguments of a torch op to a Scan. mru_kernels/ops/layout.py computes the shapes of the results for fakes: keep
// both equal.
#pragma once
#include <array>
#include <bit>
#include <limits>

#include "../cell.h"
#include "../segment.h"
#include "tensors.h"

namespace mru {

// The arguments that forward and backward share.
struct Arguments {
  const Tensors& inputs;               // the given arrays, then the scheduled scalars
  int64_t given, packed;               // masks; bit i: input i is given; input i is one of the streams in inputs[0]
  const std::vector<double>& numbers;  // the other scalars
  const OptionalTensor &initial_state, &cu_seqlens, &resets, &reset_state;
  bool reverse;
  int64_t chunk, segment;
  int64_t rank = 3;  // dimensions of a stream; 2 for a single step
};

// The facts of a cell that the binding checks.
struct CellInfo {
  int inputs, scalars;
  const Scalar* scalar;  // [scalars]
  bool is_complex;       // whether the cell accepts complex streams
  bool is_real;          // whether it accepts real ones
  bool complex_state;    // whether states are complex though streams are real
  unsigned complex_inputs;
  bool composes;  // whether its steps compose (Cell::kComposes), so that time may be cut
  bool (*takes)(unsigned given, unsigned per_channel);
  bool (*has_codes)(unsigned given, unsigned per_channel);
};
template <class C>
bool has_codes(unsigned given, unsigned per_channel) {
  return with_form<C>(given, per_channel,
                      []<unsigned kGiven, unsigned>() { return C::template Cell<float, kGiven>::kCodes; });
}
template <class C>
constexpr CellInfo info_of = {
    C::inputs(), C::scalars(),           C::kScalars,         C::kComplex,
    C::kReal,    C::has_complex_state(), C::complex_inputs(), C::template Cell<float, C::all()>::kComposes,
    &C::takes,   &has_codes<C>,
};

// The facts of a backend that the binding uses.
struct BackendInfo {
  int64_t most_chunk;                  // the longest chunk that its kernels support
  int64_t (*segment)(const Sizes& n);  // its choice of segment, for calls with segment -1
};

// A Scan and the tensors that it points into. It checks everything that a kernel relies on. The errors name the arguments
// of the op.
class BoundArguments {
 public:
  Scan scan{};
  Tensors streams;  // one view [B, T, D] per stream, in the cell's order; for the gates of a step one tensor [B, k D]
  std::array<int, kMaxInputs> place{};   // position of input i in `inputs`; -1: not given
  std::array<int, kMaxInputs> stream{};  // position of input i in `streams`; -1: not a stream
  unsigned given = 0, per_channel = 0;   // masks; bit i: array input i is given; it is a per-channel input [D]
  ScalarType type, state;                // dtype of streams; dtype of states
  bool has_reset_state = false;          // whether it is given
  bool packs_codes = false;              // whether forward packs write codes and backward reads them
  // Rows [D] of the tensors `checkpoints` and `codes` that forward saves: those of all batch rows, and spare ones.
  int64_t total_checkpoint_rows = 0, total_code_rows = 0;

  BoundArguments(const CellInfo& cell, const BackendInfo& backend, const Arguments& arguments) {
    MRU_CHECK(!arguments.inputs.empty(), "inputs: expected at least one tensor");
    kept_.reserve(4 * kMaxInputs);
    streams.reserve(kMaxInputs);
    bind_first(cell, arguments);
    bind_inputs(cell, arguments);
    bind_scalars(cell, arguments);
    bind_sequences(arguments);
    scan.reverse = arguments.reverse, scan.chunk = arguments.chunk;
    MRU_CHECK(scan.chunk > 0 && scan.chunk <= backend.most_chunk && scan.chunk % kCodesPerWord == 0,
              "chunk: expected a positive multiple of 16 up to ", backend.most_chunk, ", got ", scan.chunk);
    scan.segment = segment_of(backend, arguments.segment);
    if (!cell.composes) scan.segment = 0;
    scan.checkpoint_rows = scan.time > 0 ? (scan.time - 1) / scan.chunk : 0;
    scan.code_rows = scan.time / kCodesPerWord + (scan.offsets ? scan.sequences : 1);
    // Packing write codes pays off only with segments, which read the inputs twice.
    const bool has_codes = cell.has_codes(given, per_channel);
    packs_codes = has_codes && scan.segment > 0;
    // If the backend chooses the segment, no shape may depend on the choice, and no size may be 0 or 1, because
    // torch.compile would record another graph. So code rows are always allocated, and two rows stay unused.
    spare_rows_ = arguments.segment < 0 ? 2 : 0;
    total_checkpoint_rows = scan.batch * scan.checkpoint_rows + spare_rows_;
    if (has_codes && arguments.segment != 0) total_code_rows = scan.batch * scan.code_rows + spare_rows_;
  }

  // Binds states [slots, D], which the call updates in place; sequence n has row indices[n].
  void bind_slots(const Tensor& states, const Tensor& indices) {
    expect_device(states, "state");
    MRU_CHECK(
        states.dim() == 2 && states.size(1) == scan.channels && states.scalar_type() == state && states.is_contiguous(),
        "state: expected contiguous states [slots, ", scan.channels, "] in the state dtype");
    expect_device(indices, "state_indices");
    const ScalarType index = indices.scalar_type();
    MRU_CHECK(indices.dim() == 1 && indices.size(0) == scan.sequences &&
                  (index == ScalarType::Int || index == ScalarType::Long),
              "state_indices: expected int32 or int64 [", scan.sequences, "]");
    scan.slots = static_cast<const int64_t*>(keep(as_state(indices, ScalarType::Long)));
    scan.slot_count = states.size(0);
    scan.initial = scan.final_state = states.data_ptr();
  }
  // Checks that `t` is [sequences, D], and returns it in the state dtype.
  Tensor sequence_states(const Tensor& t, const char* name) const {
    MRU_CHECK(t.dim() == 2 && t.size(0) == scan.sequences && t.size(1) == scan.channels, name, ": expected [",
              scan.sequences, ", ", scan.channels, "]");
    return parameter(t, name, /*of_state=*/true);
  }
  // The data of a tensor [rows, D] that the forward pass saved, checked.
  void* saved(const Tensor& t, int64_t rows, ScalarType as, const char* name) {
    MRU_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == scan.channels && t.scalar_type() == as, name,
              ": expected [", rows, ", ", scan.channels, "] as the forward pass made it");
    expect_device(t, name);
    return const_cast<void*>(keep(as_state(t, as)));
  }
  // `of_state`: whether it is a state, or like one; else it is real where the streams are.
  void expect_like(const Tensor& t, const char* name, bool of_state = false) const {
    expect_device(t, name);
    const ScalarType own = t.scalar_type();
    if (of_state && state != real_state_) {
      MRU_CHECK(own == state, name, ": expected the state dtype, which is complex");
      return;
    }
    MRU_CHECK(own == type || own == real_state_ || (own == ScalarType::Float && !is_complex(scan.dtype)), name,
              ": expected the streams' dtype, the state dtype or, for real streams, float32");
  }

  Tensor rows(int64_t rows, ScalarType as) const { return allocate(streams[0], {rows, scan.channels}, as); }
  Tensor states(int64_t rows) const { return this->rows(rows, state); }
  Tensor zero_states() const {
    Tensor zeros = states(scan.sequences);
    torch::stable::zero_(zeros);
    return zeros;
  }
  // Zeros the spare rows of both tensors, and all of `codes` if forward packed no codes.
  void clear_unused(Tensor& checkpoints, Tensor& codes) const {
    if (spare_rows_ == 0) return;
    for (Tensor* t : {&checkpoints, &codes}) {
      const bool whole = t == &codes && !packs_codes;
      Tensor unused = whole ? *t : torch::stable::narrow(*t, 0, t->size(0) - spare_rows_, spare_rows_);
      torch::stable::zero_(unused);
    }
  }
  const void* keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back().data_ptr();
  }

 private:
  // The segment in steps, a multiple of the chunk.
  int64_t segment_of(const BackendInfo& backend, int64_t wanted) const {
    MRU_CHECK(wanted >= -1 && wanted <= kMostElements,
              "segment: expected -1 for the backend's own choice, 0 or a number of steps up to 2^60, got ", wanted);
    const Sizes sizes{scan.sequences, scan.batch * scan.time, scan.channels, element_bytes(scan.dtype)};
    return ceil_div(wanted < 0 ? backend.segment(sizes) : wanted, scan.chunk) * scan.chunk;
  }
  static double size(int64_t n) { return double(std::max<int64_t>(n, 1)); }  // strides are products of other sizes

  // Binds inputs[0], the first stream or several streams side by side. It sets the sizes, dtype and device of the call.
  void bind_first(const CellInfo& cell, const Arguments& arguments) {
    const Tensor& t = arguments.inputs[0];
    device_type_ = device_type(t), device_index_ = t.get_device_index();
    MRU_CHECK(t.dim() == arguments.rank, "inputs[0]: expected ",
              arguments.rank == 3 ? "[batch, time, channels]" : "[batch, channels]", ", got ", t.dim(), " dimensions");
    const int64_t gates = std::popcount(uint64_t(arguments.packed));
    MRU_CHECK(gates == 0 || (gates <= kMaxInputs && (arguments.packed & 1) != 0),
              "packed: expected a mask of inputs side by side, the first of them included, got ", arguments.packed);
    const int64_t all = t.size(arguments.rank - 1);
    MRU_CHECK(gates == 0 || all % gates == 0, "packed: expected ", gates, " gates that divide ", all, " channels");
    if (gates > 0 && arguments.rank == 3) streams = split_gates(unit_channels(t), gates);
    else streams.push_back(unit_channels(t));
    const Tensor& first = streams[0];
    type = first.scalar_type();
    real_state_ = state_type(type);
    state = cell.complex_state ? complex_type(real_state_) : real_state_;
    scan.dtype = dtype_of(type), scan.state = dtype_of(state);
    scan.batch = first.size(0), scan.time = arguments.rank == 3 ? first.size(1) : 1;
    scan.channels = arguments.rank == 3 ? first.size(2) : all / std::max<int64_t>(gates, 1);
    MRU_CHECK(size(scan.batch) * size(scan.time) * size(scan.channels) <= double(kMostElements),
              "inputs[0]: expected a size that 64 bits can address");
  }

  Stream nth_stream(size_t n) const {
    if (n < streams.size()) return stream_of(streams[n]);
    Stream gate = stream_of(streams[0]);  // of a step: a view of each gate would take as long as the step
    gate.data = static_cast<char*>(gate.data) + n * scan.channels * element_bytes(scan.dtype);
    return gate;
  }

  // Binds the array inputs: those side by side in inputs[0], then the others, one tensor each, in ascending order.
  void bind_inputs(const CellInfo& cell, const Arguments& arguments) {
    place.fill(-1), stream.fill(-1);
    const int64_t arrays = (int64_t(1) << cell.inputs) - 1;
    MRU_CHECK((arguments.packed & ~(arguments.given & arrays)) == 0,
              "packed: expected a mask of inputs that are given, got ", arguments.packed, " of ", arguments.given);
    int gates = 0;
    for (int i = 0; i < cell.inputs; ++i) {
      if ((arguments.given >> i & 1) == 0) continue;
      given |= 1u << i;
      if (i == 0 || (arguments.packed >> i & 1) != 0) place[i] = 0, stream[i] = gates++;
      else bind_own(i, cell.complex_inputs >> i & 1, arguments);
      if (stream[i] >= 0) scan.in[i].stream = nth_stream(stream[i]);
    }
    MRU_CHECK(cell.takes(given, per_channel) && (is_complex(scan.dtype) ? cell.is_complex : cell.is_real),
              "inputs: expected the inputs of the cell, got those of the mask ", given, ", per channel ", per_channel);
  }

  // Binds input i, the next tensor of `inputs`: a stream [B, T, D] or a per-channel input [D].
  void bind_own(int i, bool is_complex, const Arguments& arguments) {
    MRU_CHECK(next_ < int64_t(arguments.inputs.size()), "inputs: expected a tensor for each input of the mask ",
              arguments.given, ", got ", arguments.inputs.size());
    place[i] = int(next_);
    const Tensor& t = arguments.inputs[next_++];
    expect_device(t, "inputs");
    if (t.dim() == 1) {
      MRU_CHECK(t.size(0) == scan.channels, "inputs[", place[i], "]: expected [", scan.channels, "], got [", t.size(0),
                "]");
      scan.in[i].channel = keep(parameter(t, "inputs", is_complex));
      per_channel |= 1u << i;
      return;
    }
    MRU_CHECK(t.dim() == arguments.rank, "inputs[", place[i], "]: expected ", arguments.rank, " dimensions or [",
              scan.channels, "], got ", t.dim(), " dimensions");
    MRU_CHECK(arguments.packed == 0, "packed: expected every stream side by side, got inputs[", place[i], "] apart");
    stream[i] = int(streams.size());
    streams.push_back(unit_channels(t));
    MRU_CHECK(streams.back().scalar_type() == type && streams.back().sizes().equals(streams[0].sizes()), "inputs[",
              place[i], "]: expected the dtype and shape of the first stream");
  }

  // Binds the scalars: the scheduled ones, which are the tensors after the arrays, then the numbers.
  void bind_scalars(const CellInfo& cell, const Arguments& arguments) {
    const int64_t numbers = arguments.numbers.size(), scheduled = cell.scalars - numbers;
    MRU_CHECK(scheduled >= 0 && arguments.given >> cell.inputs == (int64_t(1) << scheduled) - 1 &&
                  next_ + scheduled == int64_t(arguments.inputs.size()),
              "inputs, given, numbers: expected the inputs and the ", cell.scalars, " scalars of the cell, got ",
              arguments.inputs.size(), " tensors, the mask ", arguments.given, " and ", numbers, " numbers");
    for (int64_t i = 0; i < scheduled; ++i) scan.scalars[i] = scalar_of(arguments.inputs[next_ + i]);
    for (int64_t i = 0; i < numbers; ++i) scan.scalars[scheduled + i] = arguments.numbers[i];
    for (int i = 0; i < cell.scalars; ++i) {
      const Scalar& scalar = cell.scalar[i];
      const double value = scan.scalars[i];
      if (scalar.least <= value && value <= scalar.most) continue;
      if (scalar.most == positive("").most)
        throw_error(scalar.name, ": expected a positive finite number, got ", value);
      throw_error(scalar.name, ": expected a value in [", scalar.least, ", ", scalar.most, "], got ", value);
    }
  }

  void bind_sequences(const Arguments& arguments) {
    scan.sequences = scan.batch;
    if (arguments.cu_seqlens) {
      const Tensor& t = *arguments.cu_seqlens;
      expect_device(t, "cu_seqlens");
      const ScalarType offset = t.scalar_type();
      MRU_CHECK(t.dim() == 1 && t.numel() > 0 && (offset == ScalarType::Int || offset == ScalarType::Long),
                "cu_seqlens: expected int32 or int64 [sequences + 1]");
      MRU_CHECK(scan.batch == 1, "cu_seqlens: expected streams of batch 1, got ", scan.batch);
      scan.sequences = t.numel() - 1;
      MRU_CHECK(size(scan.sequences) * size(scan.channels) <= double(kMostElements),
                "cu_seqlens: expected a number of sequences that 64 bits can address");
      scan.offsets = static_cast<const int64_t*>(keep(as_state(t, ScalarType::Long)));
    }
    if (arguments.initial_state) scan.initial = keep(sequence_states(*arguments.initial_state, "initial_state"));
    if (arguments.resets) {
      const Tensor& t = *arguments.resets;
      expect_device(t, "resets");
      MRU_CHECK(
          t.dim() == 2 && t.size(0) == scan.batch && t.size(1) == scan.time && t.scalar_type() == ScalarType::Bool,
          "resets: expected bool [", scan.batch, ", ", scan.time, "]");
      scan.resets = static_cast<const bool*>(keep(as_state(t, ScalarType::Bool)));
    }
    MRU_CHECK(arguments.resets || !arguments.reset_state, "reset_state: expected resets with it");
    has_reset_state = arguments.reset_state.has_value();
    if (has_reset_state) scan.reset_state = keep(sequence_states(*arguments.reset_state, "reset_state"));
  }

  void expect_device(const Tensor& t, const char* name) const {
    MRU_CHECK(device_type(t) == device_type_ && t.get_device_index() == device_index_, name,
              ": expected the streams' device");
  }
  Tensor parameter(const Tensor& t, const char* name, bool of_state) const {
    expect_like(t, name, of_state);
    return as_state(t, state);
  }

  int32_t device_type_, device_index_;
  int64_t next_ = 1;  // position of the next tensor of `inputs`
  int64_t spare_rows_ = 0;
  ScalarType real_state_;  // the state dtype, or that of its parts where only the state is complex
  Tensors kept_;
};

}  // namespace mru
