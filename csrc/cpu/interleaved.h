// Few channels leave most lanes of a vector empty. So segments of equal length lie side by side here: P segments of D channels
// are scanned as one of P D channels. Chunks of their streams are copied into rows of P D, and back.
#pragma once
#include "plan.h"

namespace mru::cpu {

// Segments [first, first + count) of a list, as long as each other. Their rows adjoin in Rows: they are one row [count D].
struct Run {
  int64_t first, count;
};
// The most segments of a run; 1 if a scan is not interleaved.
int64_t most_in_run(const Scan& scan);
// The runs of all segments; empty if they are better scanned one by one.
std::vector<Run> find_runs(const Scan& scan, const Segments& segments);
// Calls f(run, number) for every run, on several threads.
template <class F>
void for_runs(const Scan& scan, const std::vector<Run>& runs, const F& f) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(runs[i], i);
  };
  if (runs.size() <= 1 || is_serial(scan)) some(0, runs.size());
  else torch::stable::parallel_for(0, runs.size(), 1, some);
}

// The kernels of kernels.h for a run. States, maps and `late` are rows [P D].
class Interleaved {
 public:
  Interleaved(const Scan& scan, const Kernels& kernels, const Segments& segments, Run run);

  void forward(decltype(Kernels::forward) kernel, void* state);
  void summarize(MapRow map, void* late);
  void summarize_adjoint(MapRow map, void* late);
  // `totals` [inputs that come per channel, D]: the sums over time of their gradients.
  void backward(void* m, void* late, void* totals);

 private:
  enum class To { kRows, kStreams };

  template <To kTo>
  void copy(const Stream& stream, const Stream& rows, int64_t begin, int64_t steps) const;
  template <To kTo>
  void copy_codes(int64_t begin, int64_t steps) const;
  void copy_inputs(int64_t begin, int64_t steps) const;
  char* checkpoint(const Segment& segment, int64_t step) const;
  void enter(int64_t begin) const;
  void save(int64_t end, const void* state) const;

  // Calls f(part, begin) for the chunks, from the left or from the right. `begin`: the first step in each of the segments.
  template <class F>
  void for_chunks(const F& f) const;
  template <class F>
  void for_chunks_from_right(const F& f) const;

  Segment part_of(int64_t begin) const;  // the chunk from `begin` on, as a segment of `of_chunk_`

  char* allocate(int64_t bytes);
  Stream rows();

  const Scan& scan_;
  const Kernels& k_;
  const Segment* const segments_;
  const int64_t count_, columns_, length_;
  std::vector<std::vector<char>> memory_;
  Scan of_chunk_;  // of one chunk
};

}  // namespace mru::cpu
