// The caller's lists as everything else wants them: for every (q row, kv head) the ids of valid blocks, ascending, each
// once. Nothing after this looks at a raw index again.
#pragma once

#include <cstdint>

#include "cpu/sequences.h"

namespace nsa::cpu {

struct BlockLists {
  std::int64_t num_heads = 0;      // Hkv
  std::int64_t width = 0;          // S
  std::int32_t* ids = nullptr;     // [total_q, Hkv, S] local block ids; the first `counts` of a row count
  std::int32_t* counts = nullptr;  // [total_q, Hkv]; 0: a dead row

  std::int64_t list(std::int64_t q_row, std::int64_t head) const { return q_row * num_heads + head; }
  std::int32_t count(std::int64_t q_row, std::int64_t head) const { return counts[list(q_row, head)]; }
  const std::int32_t* begin(std::int64_t q_row, std::int64_t head) const { return ids + list(q_row, head) * width; }
  const std::int32_t* end(std::int64_t q_row, std::int64_t head) const {
    return begin(q_row, head) + count(q_row, head);
  }
};

BlockLists carve_block_lists(const SelectedAttentionProblem& problem, const Sequences& sequences, Carver& carver);
void fill_block_lists(const SelectedAttentionProblem& problem, const Sequences& sequences, const BlockLists& lists,
                      int num_threads);

}  // namespace nsa::cpu
