#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace nsa::cpu {

inline int resolve_threads(int num_threads) { return num_threads > 0 ? num_threads : omp_get_max_threads(); }

// Calls body(thread, begin, end) on pieces of [0, count) of at most `grain`, 0 <= thread < num_threads. Which thread
// gets a piece is left to chance (lists are uneven), so a piece must not care.
template <typename Body>
void parallel_for(int num_threads, std::int64_t count, std::int64_t grain, const Body& body) {
  const std::int64_t pieces = (count + grain - 1) / grain;
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads, pieces));
  if (threads <= 1) {
    for (std::int64_t i = 0; i < pieces; ++i) body(0, i * grain, std::min(count, (i + 1) * grain));
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t i = 0; i < pieces; ++i) {
    body(omp_get_thread_num(), i * grain, std::min(count, (i + 1) * grain));
  }
}

}  // namespace nsa::cpu
