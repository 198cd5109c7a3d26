#include "cpu/block_lists.h"

#include <algorithm>
#include <limits>

#include "cpu/parallel.h"

namespace nsa::cpu {
namespace {

// Entries of the list that count, [0, S].
std::int64_t entries_of(const SelectedAttentionProblem& problem, RowIndex index, std::int64_t head) {
  std::int64_t count = problem.num_indices;
  if (problem.block_counts.data != nullptr) {
    count = static_cast<const std::int32_t*>(problem.block_counts.data)[offset_of(problem.block_counts, index, head)];
  } else if (problem.block_count >= 0) {
    count = problem.block_count;
  }
  return std::clamp<std::int64_t>(count, 0, problem.num_indices);
}

// Copies the entries in [0, limit) and returns how many there are. An int64 entry is compared as it is, never
// truncated.
template <typename Index>
std::int64_t copy_valid(const Index* entries, std::int64_t stride, std::int64_t count, std::int64_t limit,
                        std::int32_t* ids) {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Index entry = entries[i * stride];
    if (entry >= 0 && entry < limit) ids[found++] = static_cast<std::int32_t>(entry);
  }
  return found;
}

std::int64_t fill_list(const SelectedAttentionProblem& problem, RowIndex index, std::int64_t head, std::int64_t limit,
                       std::int32_t* ids) {
  const IndexTensor& raw = problem.block_indices;
  const std::int64_t entries = limit > 0 ? entries_of(problem, index, head) : 0;
  if (entries == 0) return 0;
  const std::int64_t offset = offset_of(raw, index, head);
  const std::int64_t found =
      raw.type == IndexType::kInt64
          ? copy_valid(static_cast<const std::int64_t*>(raw.data) + offset, raw.entry_stride, entries, limit, ids)
          : copy_valid(static_cast<const std::int32_t*>(raw.data) + offset, raw.entry_stride, entries, limit, ids);
  // select_blocks returns ascending lists.
  if (!std::is_sorted(ids, ids + found)) std::sort(ids, ids + found);
  return std::unique(ids, ids + found) - ids;
}

}  // namespace

BlockLists carve_block_lists(const SelectedAttentionProblem& problem, const Sequences& sequences, Carver& carver) {
  BlockLists lists;
  lists.num_heads = problem.num_heads_k;
  lists.width = problem.num_indices;
  lists.ids = carver.take<std::int32_t>(sequences.total_q * lists.num_heads * lists.width);
  lists.counts = carver.take<std::int32_t>(sequences.total_q * lists.num_heads);
  return lists;
}

void fill_block_lists(const SelectedAttentionProblem& problem, const Sequences& sequences, const BlockLists& lists,
                      int num_threads) {
  constexpr std::int64_t kRowsPerPiece = 256;
  constexpr std::int64_t kMaxIds = std::int64_t{std::numeric_limits<std::int32_t>::max()} + 1;
  parallel_for(num_threads, sequences.total_q, kRowsPerPiece, [&](int, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t limit = std::min(place_query(problem, sequences, row).num_visible_blocks, kMaxIds);
      const RowIndex index = index_of_q(problem, row);
      for (std::int64_t head = 0; head < lists.num_heads; ++head) {
        const std::int64_t list = lists.list(row, head);
        lists.counts[list] =
            static_cast<std::int32_t>(fill_list(problem, index, head, limit, lists.ids + list * lists.width));
      }
    }
  });
}

}  // namespace nsa::cpu
