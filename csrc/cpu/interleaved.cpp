#include "interleaved.h"

#include <cstring>

#include "kernels/vector.h"

namespace mru::cpu {
namespace {

constexpr int64_t kMostBytes = 16;  // of one step of a stream
constexpr int64_t kColumns = 16;    // of a run: the most lanes of a vector

// N vectors of N elements as a matrix: [i][j] becomes [j][i].
template <class V, int N>
MRU_INLINE void transpose(V (&rows)[N]) {
  for (int turn = 1; turn < N; turn *= 2) {
    V next[N];
    for (int i = 0; i < N / 2; ++i) {
      next[2 * i] = in_turn<0, N>(rows[i], rows[i + N / 2]);
      next[2 * i + 1] = in_turn<N / 2, N>(rows[i], rows[i + N / 2]);
    }
    for (int i = 0; i < N; ++i) rows[i] = next[i];
  }
}

// Copies elements [steps][count] of rows from or to streams: element [t][p] lies at `row + t count + p`, and in stream p at
// `at[p] + t by`, where `by` is in bytes.
template <class E, bool kToRows>
void copy_elements(char* const* at, int64_t by, E* row, int64_t steps, int64_t count) {
  constexpr int N = sizeof(E) < 16 ? 16 / sizeof(E) : 1;
  const bool adjoin = N > 1 && (by == sizeof(E) || by == -int64_t(sizeof(E)));
  for (int64_t p = 0; p < count;) {
    const int64_t columns = std::min<int64_t>(count - p, N);
    int64_t t = 0;
    if constexpr (N > 1)
      for (; adjoin && columns == N && t + N <= steps; t += N) {  // a square of N steps of N streams
        const auto of_stream = [&](int i) -> void* { return at[p + i] + (by > 0 ? t : t + N - 1) * by; };
        const auto of_row = [&](int i) -> void* { return row + (by > 0 ? t + i : t + N - 1 - i) * count + p; };
        Vector<E, N> v[N];
        for (int i = 0; i < N; ++i) v[i] = load_as<Vector<E, N>>(kToRows ? of_stream(i) : of_row(i));
        transpose(v);
        for (int i = 0; i < N; ++i) std::memcpy(kToRows ? of_row(i) : of_stream(i), &v[i], sizeof v[i]);
      }
    for (; t < steps; ++t)
      for (int64_t i = p; i < p + columns; ++i) {
        void *const of_stream = at[i] + t * by, *const of_row = row + t * count + i;
        std::memcpy(kToRows ? of_row : of_stream, kToRows ? of_stream : of_row, sizeof(E));
      }
    p += columns;
  }
}
// The same for elements of `bytes`: 2, 4, 8 or 16.
template <bool kToRows>
void copy_columns(int64_t bytes, char* const* at, int64_t by, char* row, int64_t steps, int64_t count) {
  const auto copy = [&]<class E>(E* rows) { copy_elements<E, kToRows>(at, by, rows, steps, count); };
  switch (bytes) {
    case 2: return copy(reinterpret_cast<uint16_t*>(row));
    case 4: return copy(reinterpret_cast<uint32_t*>(row));
    case 8: return copy(reinterpret_cast<uint64_t*>(row));
    default: return copy(reinterpret_cast<Complex<uint64_t>*>(row));
  }
}

}  // namespace

int64_t most_in_run(const Scan& scan) {
  const bool is_plain = !scan.resets && !scan.slots && !scan.grad_checkpoints;
  const bool is_few = scan.channels == 1 || scan.channels == 2 || scan.channels == 4;
  const bool is_narrow = scan.channels * element_bytes(scan.dtype) <= kMostBytes;
  return is_plain && is_few && is_narrow ? kColumns / scan.channels : 1;
}

std::vector<Run> find_runs(const Scan& scan, const Segments& segments) {
  std::vector<Run> runs;
  const int64_t most = most_in_run(scan);
  if (most == 1 || scan.segment == 0) return runs;
  const auto length = [&](int64_t i) { return segments.list[i].end - segments.list[i].begin; };
  for (int64_t i = 0; i < segments.count(); ++i) {
    const bool joins = !runs.empty() && runs.back().count < most && length(i) == length(runs.back().first);
    if (joins) ++runs.back().count;
    else runs.push_back({i, 1});
  }
  if (2 * int64_t(runs.size()) > segments.count()) runs.clear();  // copies would cost more than lanes bring
  return runs;
}

Interleaved::Interleaved(const Scan& scan, const Kernels& kernels, const Segments& segments, Run run)
    : scan_(scan),
      k_(kernels),
      segments_(&segments.list[run.first]),
      count_(run.count),
      columns_(run.count * scan.channels),
      length_(segments_->end - segments_->begin),
      of_chunk_(scan) {
  of_chunk_.batch = of_chunk_.sequences = 1;
  of_chunk_.time = scan.chunk;
  of_chunk_.channels = columns_;
  of_chunk_.offsets = nullptr;
  of_chunk_.reverse = false;
  of_chunk_.segment = 0;
  of_chunk_.non_temporal = false;
  of_chunk_.initial = nullptr;
  of_chunk_.checkpoints = nullptr;
  for (int i = 0; i < k_.inputs; ++i) {
    Input& in = of_chunk_.in[i];
    if (in.stream.data) in.stream = rows();
    if (of_chunk_.grad_in[i].data) of_chunk_.grad_in[i] = rows();
    if (!in.channel) continue;
    char* const all = allocate(count_ * row_bytes(scan));
    for (int64_t p = 0; p < count_; ++p) std::memcpy(all + p * row_bytes(scan), scan.in[i].channel, row_bytes(scan));
    in.channel = all;
  }
  if (of_chunk_.h.data) of_chunk_.h = rows();
  if (of_chunk_.grad_h.data) of_chunk_.grad_h = rows();
  if (of_chunk_.codes)
    of_chunk_.codes =
        reinterpret_cast<int32_t*>(allocate(ceil_div(scan.chunk, kCodesPerWord) * columns_ * sizeof(int32_t)));
}

char* Interleaved::allocate(int64_t bytes) { return memory_.emplace_back(bytes).data(); }
Stream Interleaved::rows() { return {allocate(scan_.chunk * columns_ * element_bytes(scan_.dtype)), 0, columns_}; }

template <class F>
void Interleaved::for_chunks(const F& f) const {
  for (int64_t begin = 0; begin < length_; begin += scan_.chunk) f(part_of(begin), begin);
}
template <class F>
void Interleaved::for_chunks_from_right(const F& f) const {
  for (int64_t begin = (length_ - 1) / scan_.chunk * scan_.chunk; begin >= 0; begin -= scan_.chunk)
    f(part_of(begin), begin);
}
Segment Interleaved::part_of(int64_t begin) const {
  const int64_t steps = std::min(scan_.chunk, length_ - begin);
  return {.batch = 0, .sequence = 0, .start = 0, .length = steps, .word = 0, .begin = 0, .end = steps};
}

template <Interleaved::To kTo>
void Interleaved::copy(const Stream& stream, const Stream& rows, int64_t begin, int64_t steps) const {
  const int64_t bytes = element_bytes(scan_.dtype);
  char* at[kColumns];
  for (int64_t p = 0; p < count_; ++p) {
    const Segment& segment = segments_[p];
    const int64_t scanned = segment.start + segment.begin + begin,
                  t = scan_.reverse ? scan_.time - 1 - scanned : scanned;
    at[p] = static_cast<char*>(stream.data) + (segment.batch * stream.batch + t * stream.time) * bytes;
  }
  const int64_t by = (scan_.reverse ? -stream.time : stream.time) * bytes;
  copy_columns<kTo == To::kRows>(scan_.channels * bytes, at, by, static_cast<char*>(rows.data), steps, count_);
}
template <Interleaved::To kTo>
void Interleaved::copy_codes(int64_t begin, int64_t steps) const {
  const int64_t bytes = scan_.channels * sizeof(int32_t);
  char* at[kColumns];
  for (int64_t p = 0; p < count_; ++p) {
    const Segment& segment = segments_[p];
    const int64_t word = segment.batch * scan_.code_rows + segment.word + (segment.begin + begin) / kCodesPerWord;
    at[p] = reinterpret_cast<char*>(scan_.codes) + word * bytes;
  }
  char* const rows = reinterpret_cast<char*>(of_chunk_.codes);
  copy_columns<kTo == To::kRows>(bytes, at, bytes, rows, ceil_div(steps, kCodesPerWord), count_);
}
void Interleaved::copy_inputs(int64_t begin, int64_t steps) const {
  for (int i = 0; i < k_.inputs; ++i)
    if (scan_.in[i].stream.data) copy<To::kRows>(scan_.in[i].stream, of_chunk_.in[i].stream, begin, steps);
}

char* Interleaved::checkpoint(const Segment& segment, int64_t step) const {
  return row(scan_.checkpoints, scan_,
             segment.batch * scan_.checkpoint_rows + (segment.start + step) / scan_.chunk - 1);
}
// Copies the states that enter the chunk at `begin`, as the states before the interleaved scan.
void Interleaved::enter(int64_t begin) const {
  for (int64_t p = 0; p < count_; ++p) {
    const Segment& segment = segments_[p];
    const int64_t step = segment.begin + begin;
    const void* const initial =
        scan_.initial ? row(const_cast<void*>(scan_.initial), scan_, segment.sequence) : nullptr;
    const void* const from = step > 0 ? checkpoint(segment, step) : initial;
    char* const state = row(const_cast<void*>(of_chunk_.initial), scan_, p);
    if (from) std::memcpy(state, from, row_bytes(scan_));
    else std::memset(state, 0, row_bytes(scan_));
  }
}
void Interleaved::save(int64_t end, const void* state) const {
  for (int64_t p = 0; scan_.checkpoints && p < count_; ++p) {
    const int64_t step = segments_[p].begin + end;
    if (step % scan_.chunk == 0 && step < segments_[p].length)
      std::memcpy(checkpoint(segments_[p], step), row(const_cast<void*>(state), scan_, p), row_bytes(scan_));
  }
}

void Interleaved::forward(decltype(Kernels::forward) kernel, void* state) {
  for_chunks([&](const Segment& part, int64_t begin) {
    if (kernel == k_.forward_from_codes) copy_codes<To::kRows>(begin, part.end);
    else copy_inputs(begin, part.end);
    kernel(of_chunk_, part, 0, columns_, state);
    if (kernel == k_.forward_to_codes) copy_codes<To::kStreams>(begin, part.end);
    copy<To::kStreams>(scan_.h, of_chunk_.h, begin, part.end);
    save(begin + part.end, state);
  });
}

void Interleaved::summarize(MapRow map, void* late) {
  k_.identity(columns_, map);
  for_chunks([&](const Segment& part, int64_t begin) {
    copy_inputs(begin, part.end);
    k_.summarize(of_chunk_, part, 0, columns_, map, begin + part.end == length_ ? late : nullptr);
    if (of_chunk_.codes) copy_codes<To::kStreams>(begin, part.end);
  });
}

void Interleaved::summarize_adjoint(MapRow map, void* late) {
  k_.identity(columns_, map);
  for_chunks_from_right([&](const Segment& part, int64_t begin) {
    if (of_chunk_.codes) copy_codes<To::kRows>(begin, part.end);
    else copy_inputs(begin, part.end);
    copy<To::kRows>(scan_.grad_h, of_chunk_.grad_h, begin, part.end);
    k_.summarize_adjoint(of_chunk_, part, 0, columns_, map, begin == 0 ? late : nullptr);
  });
}

void Interleaved::backward(void* m, void* late, void* totals) {
  const int64_t inputs = __builtin_popcount(k_.channels), bytes = state_bytes(scan_);
  char* const sums = allocate(2 * inputs * columns_ * bytes);
  char* const scratch = allocate(scratch_rows(scan_.chunk) * columns_ * bytes);
  of_chunk_.initial = allocate(columns_ * bytes);
  for_chunks_from_right([&](const Segment& part, int64_t begin) {
    enter(begin);
    copy_inputs(begin, part.end);
    copy<To::kRows>(scan_.grad_h, of_chunk_.grad_h, begin, part.end);
    k_.backward(of_chunk_, part, 0, columns_, m, sums, columns_, scratch, begin == 0 ? late : nullptr);
    for (int i = 0; i < k_.inputs; ++i)
      if (scan_.grad_in[i].data) copy<To::kStreams>(scan_.grad_in[i], of_chunk_.grad_in[i], begin, part.end);
  });
  for (int64_t i = 0; i < inputs; ++i)
    k_.reduce(scan_.channels, /*rows=*/count_, scan_.channels, inputs * columns_, sums + i * columns_ * bytes,
              row(totals, scan_, i));
}

}  // namespace mru::cpu
