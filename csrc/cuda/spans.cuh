// Where a thread is: its segment and channels, and the spans of its segment.
//
//   sequence   n; it begins and ends inside a row       span   a segment's part of one sequence
#pragma once
#include "call.cuh"

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

struct Span {
  int64_t row, sequence, begin, end;
  bool first, last;  // whether the sequence begins at `begin`, ends at `end`
};

// The spans of a segment, one after another; with direction -1 from the right.
class Spans {
 public:
  __device__ __forceinline__ Spans(const Scan& scan, const Plan& plan, int64_t segment, int direction)
      : scan_(scan), direction_(direction) {
    if (!plan.is_cut()) {
      one_ = {segment, segment, 0, scan.time, true, true};
      if (scan.offsets) one_.row = 0, bounds(segment, one_.begin, one_.end);
    } else {
      const int64_t row = plan.row_of(segment), begin = plan.in_row(segment) * scan.segment;
      const int64_t end = begin + scan.segment < scan.time ? begin + scan.segment : scan.time;
      one_ = {row, row, begin, end, begin == 0, end == scan.time};
      packed_ = scan.offsets != nullptr;
      if (packed_) order_ = find();
    }
  }

  __device__ __forceinline__ bool next(Span& span) {
    if (!packed_) {
      span = one_;
      const bool more = !done_;
      done_ = true;
      return more;
    }
    for (; order_ >= 0 && order_ < scan_.sequences; order_ += direction_) {
      const int64_t n = sequence(order_);
      int64_t begin, end;
      bounds(n, begin, end);
      if (direction_ > 0 ? begin >= one_.end : end <= one_.begin) return false;
      span = {0, n, begin > one_.begin ? begin : one_.begin, end < one_.end ? end : one_.end, false, false};
      span.first = span.begin == begin, span.last = span.end == end;
      if (span.begin >= span.end) continue;  // an empty sequence
      order_ += direction_;
      return true;
    }
    return false;
  }

 private:
  __device__ __forceinline__ int64_t sequence(int64_t order) const {
    return scan_.reverse ? scan_.sequences - 1 - order : order;
  }
  __device__ __forceinline__ int64_t offset(int64_t n) const {  // device data: any value must stay in bounds
    const int64_t at = load<Traffic::kIndex, 1>(scan_.offsets + n).at[0];
    return at < 0 ? 0 : (at < scan_.time ? at : scan_.time);
  }
  __device__ __forceinline__ void bounds(int64_t n, int64_t& begin, int64_t& end) const {
    begin = offset(n), end = offset(n + 1);
    if (end < begin) end = begin;
    if (scan_.reverse) {
      const int64_t left = begin;
      begin = scan_.time - end, end = scan_.time - left;
    }
  }
  // In scan order, the first sequence that ends after the segment begins; from the right, the last that begins before
  // the segment's end.
  __device__ __forceinline__ int64_t find() const {
    int64_t low = 0, high = scan_.sequences;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      int64_t begin, end;
      bounds(sequence(middle), begin, end);
      const bool before = direction_ > 0 ? end <= one_.begin : begin < one_.end;
      if (before) low = middle + 1;
      else high = middle;
    }
    return direction_ > 0 ? low : low - 1;
  }

  const Scan& scan_;
  const int direction_;
  Span one_;
  int64_t order_ = 0;
  bool packed_ = false, done_ = false;
};

}  // namespace mru::cuda
