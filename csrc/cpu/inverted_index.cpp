#include "cpu/inverted_index.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace nsa::cpu {

InvertedIndex carve_inverted_index(const SelectedAttentionProblem& problem, const Sequences& sequences,
                                   Carver& carver) {
  constexpr std::int64_t kSegment = 2048;
  // Larger blocks have many key tiles, each its own work.
  constexpr std::int64_t kMaxSplitBlock = 128;
  const std::int64_t entries = sequences.total_q * problem.num_heads_k * problem.num_indices;
  InvertedIndex index;
  index.num_blocks = sequences.num_blocks;
  index.num_lists = problem.num_heads_k * sequences.num_blocks;
  index.segment = problem.block_size <= kMaxSplitBlock ? kSegment : std::max<std::int64_t>(sequences.total_q, 1);
  // ceil(length / segment) <= 2 length / segment where length > segment, and no list is longer than total_q.
  index.max_split_segments = sequences.total_q > index.segment ? 2 * entries / index.segment : 0;
  index.list_begin = carver.take<std::int64_t>(index.num_lists + 1);
  index.rows = carver.take<std::int64_t>(entries);
  index.segment_begin = carver.take<std::int64_t>(index.num_lists + 1);
  index.split_begin = carver.take<std::int64_t>(index.num_lists + 1);
  return index;
}

void fill_inverted_index(const SelectedAttentionProblem& problem, const Sequences& sequences, const BlockLists& lists,
                         const InvertedIndex& index, int num_threads) {
  std::int64_t* const counts = index.segment_begin;  // not yet in use
  std::fill(counts, counts + index.num_lists + 1, 0);
  // Calls visit(q row, list) for every entry of one head, q rows ascending. Heads share no list.
  const auto for_entries = [&](std::int64_t head, const auto& visit) {
    for (std::int64_t b = 0; b < sequences.batch; ++b) {
      const std::int64_t first_list = head * index.num_blocks + sequences.block_begin[b];
      for (std::int64_t q_row = sequences.q_begin[b]; q_row < sequences.q_begin[b + 1]; ++q_row) {
        const std::int32_t* const end = lists.end(q_row, head);
        for (const std::int32_t* id = lists.begin(q_row, head); id != end; ++id) visit(q_row, first_list + *id);
      }
    }
  };
  parallel_for(num_threads, problem.num_heads_k, 1, [&](int, std::int64_t head, std::int64_t) {
    for_entries(head, [&](std::int64_t, std::int64_t list) { ++counts[list]; });
  });
  index.list_begin[0] = 0;
  for (std::int64_t list = 0; list < index.num_lists; ++list) {
    index.list_begin[list + 1] = index.list_begin[list] + counts[list];
    counts[list] = index.list_begin[list];
  }
  parallel_for(num_threads, problem.num_heads_k, 1, [&](int, std::int64_t head, std::int64_t) {
    for_entries(head, [&](std::int64_t q_row, std::int64_t list) { index.rows[counts[list]++] = q_row; });
  });
  index.segment_begin[0] = index.split_begin[0] = 0;
  for (std::int64_t list = 0; list < index.num_lists; ++list) {
    const std::int64_t segments = std::max<std::int64_t>(1, (index.length(list) + index.segment - 1) / index.segment);
    index.segment_begin[list + 1] = index.segment_begin[list] + segments;
    index.split_begin[list + 1] = index.split_begin[list] + (segments > 1 ? segments : 0);
  }
}

}  // namespace nsa::cpu
