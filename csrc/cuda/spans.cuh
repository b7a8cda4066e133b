// Where a thread is: its segment and channels, and the spans of its segment.
//
//   sequence   n; it begins and ends inside a row       span   a segment's part of one sequence, between two resets
//   boundary   a position after a multiple of the chunk in a sequence: the state before it is saved
#pragma once
#include "resets.cuh"

namespace mru::cuda {

// The segment of a thread and the first of its W channels.
struct Place {
  int64_t segment, d;
};
template <class F>
__device__ __forceinline__ Place place(const Call<F>& call) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, segment = call.across(thread);
  return {segment, thread * F::W - segment * call.scan.channels};
}

// The first step of packed sequence n, in the order of cu_seqlens. Device data: any value must stay in bounds.
__device__ __forceinline__ int64_t offset_of(const Scan& scan, int64_t n) {
  const int64_t at = load<Traffic::kIndex, 1>(scan.offsets + n).at[0];
  return at < 0 ? 0 : (at < scan.time ? at : scan.time);
}
// The positions [begin, end) of sequence n.
__device__ __forceinline__ void bounds(const Scan& scan, int64_t n, int64_t& begin, int64_t& end) {
  begin = offset_of(scan, n), end = offset_of(scan, n + 1);
  if (end < begin) end = begin;
  if (scan.reverse) {
    const int64_t left = begin;
    begin = scan.time - end, end = scan.time - left;
  }
}

struct Span {
  int64_t sequence, start, begin, end;  // start: position of the sequence's first step
  bool first, last;                     // whether the sequence begins at `begin`, ends at `end`
  bool whole = false;                   // whether the sequence begins and ends in the segment
  bool resets = false;                  // whether the state is reset before the first step
  bool left = false, right = false;     // whether a span of the same sequence and segment is next to it

  __device__ __forceinline__ int64_t row(const Scan& scan) const { return scan.offsets ? 0 : sequence; }
  // The row of the sequence's initial and final state.
  __device__ __forceinline__ int64_t state(const Scan& scan) const {
    return scan.slots ? load<Traffic::kIndex, 1>(scan.slots + sequence).at[0] : sequence;
  }
  // Whether the state on entry is the initial or the reset state.
  __device__ __forceinline__ bool enters() const { return first || resets; }
  // A position between start and the sequence's end.
  __device__ __forceinline__ int64_t chunk_begin(const Scan& scan, const Plan& plan, int64_t position) const {
    return start + plan.chunk_divisor(position - start) * scan.chunk;
  }
  // Whether a position of the sequence after its start is a boundary.
  __device__ __forceinline__ bool is_boundary(const Scan& scan, const Plan& plan, int64_t position) const {
    return chunk_begin(scan, plan, position) == position;
  }
};

// The spans of a segment, one after another; with direction -1 from the right.
class Spans {
 public:
  template <class F>
  __device__ __forceinline__ Spans(const Call<F>& call, int64_t segment, int direction)
      : scan_(call.scan), plan_(call.plan), reset_bits_(call.work.reset_bits), direction_(direction) {
    if (!plan_.is_cut()) {
      one_ = {segment, 0, 0, scan_.time, true, true, true};
      if (scan_.offsets) bounds(scan_, segment, one_.begin, one_.end), one_.start = one_.begin;
    } else {
      const int64_t row = plan_.row_of(segment), begin = plan_.in_row(segment) * scan_.segment;
      const int64_t end = begin + scan_.segment < scan_.time ? begin + scan_.segment : scan_.time;
      one_ = {row, 0, begin, end, begin == 0, end == scan_.time};
      if (packed()) order_ = find();
    }
  }

  // The next span; `span` is the one before it, or has no neighbour if this is the first call.
  __device__ __forceinline__ bool next(Span& span) {
    if (!reset_bits_) return next_part(span);
    const bool more = direction_ > 0 ? span.right : span.left;
    const int64_t reset = direction_ > 0 ? span.end : span.begin;
    if (more) span = part(span.sequence);
    else if (!next_part(span)) return false;
    const ResetBits bits(plan_, reset_bits_, span.row(scan_));
    if (direction_ > 0) {
      const int64_t end = span.end;
      if (more) span.begin = reset, span.first = false;
      span.left = more;
      span.resets = span.begin < end && bits.next(span.begin, span.begin + 1) == span.begin;
      span.end = bits.next(span.begin + 1, end);
      span.right = span.end < end;
      span.last = span.last && !span.right;
    } else {
      const int64_t begin = span.begin;
      if (more) span.end = reset, span.last = false;
      span.right = more;
      const int64_t last = bits.previous(span.end, begin);
      span.resets = last >= begin;
      span.begin = span.resets ? last : begin;
      span.left = span.begin > begin;
      span.first = span.first && !span.left;
    }
    return true;
  }

 private:
  __device__ __forceinline__ bool packed() const { return scan_.offsets && plan_.is_cut(); }
  // The part of sequence n in the segment.
  __device__ __forceinline__ Span part(int64_t n) const {
    if (!packed()) return one_;
    int64_t begin, end;
    bounds(scan_, n, begin, end);
    Span span{n, begin, begin > one_.begin ? begin : one_.begin, end < one_.end ? end : one_.end, false, false};
    span.first = span.begin == begin, span.last = span.end == end;
    span.whole = span.first && span.last;
    return span;
  }
  // The next part of a sequence in the segment.
  __device__ __forceinline__ bool next_part(Span& span) {
    if (!packed()) {
      span = one_;
      return order_++ == 0;
    }
    for (; order_ >= 0 && order_ < scan_.sequences; order_ += direction_) {
      const Span next = part(sequence(order_));
      if (direction_ > 0 ? next.begin >= one_.end : next.end <= one_.begin) return false;
      if (next.begin >= next.end) continue;  // an empty sequence
      order_ += direction_;
      span = next;
      return true;
    }
    return false;
  }
  __device__ __forceinline__ int64_t sequence(int64_t order) const {
    return scan_.reverse ? scan_.sequences - 1 - order : order;
  }
  // In scan order, the first sequence that ends after the segment begins; from the right, the last that begins before
  // the segment's end.
  __device__ __forceinline__ int64_t find() const {
    int64_t low = 0, high = scan_.sequences;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      int64_t begin, end;
      bounds(scan_, sequence(middle), begin, end);
      const bool before = direction_ > 0 ? end <= one_.begin : begin < one_.end;
      if (before) low = middle + 1;
      else high = middle;
    }
    return direction_ > 0 ? low : low - 1;
  }

  const Scan& scan_;
  const Plan& plan_;
  const uint32_t* const reset_bits_;
  const int direction_;
  Span one_;
  int64_t order_ = 0;
};

}  // namespace mru::cuda
