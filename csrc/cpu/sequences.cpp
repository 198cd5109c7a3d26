#include "cpu/sequences.h"

#include <algorithm>

namespace nsa::cpu {
namespace {

std::int64_t count_blocks(std::int64_t keys, std::int64_t block_size) {
  return keys == 0 ? 0 : (keys - 1) / block_size + 1;  // keys + block_size may overflow
}

}  // namespace

void repair_offsets(const std::int32_t* cu_seqlens, std::int64_t batch, std::int64_t total, std::int64_t* begin) {
  std::int64_t highest = 0;
  for (std::int64_t b = 0; b <= batch; ++b) {
    highest = std::max(highest, std::min<std::int64_t>(cu_seqlens[b], total));
    begin[b] = highest;
  }
}

std::int64_t find_sequence(const std::int64_t* begin, std::int64_t batch, std::int64_t value) {
  return std::upper_bound(begin, begin + batch + 1, value) - begin - 1;
}

Sequences carve_sequences(const SelectedAttentionProblem& problem, Carver& carver) {
  const std::int64_t copies = is_packed(problem) ? 1 : problem.batch;
  Sequences s;
  s.total_q = copies * problem.seqlen_q;
  s.total_k = copies * problem.seqlen_k;
  // Without rows any batch is valid, up to 2^63 - 1, and [B + 1] offsets would overflow the workspace's size.
  s.batch = is_packed(problem) || s.total_q + s.total_k > 0 ? problem.batch : 0;
  s.num_blocks = is_packed(problem) ? problem.seqlen_k / problem.block_size + problem.batch
                                    : problem.batch * count_blocks(problem.seqlen_k, problem.block_size);
  s.q_begin = carver.take<std::int64_t>(s.batch + 1);
  s.k_begin = carver.take<std::int64_t>(s.batch + 1);
  s.block_begin = carver.take<std::int64_t>(s.batch + 1);
  return s;
}

void fill_sequences(const SelectedAttentionProblem& problem, const Sequences& s) {
  if (is_packed(problem)) {
    repair_offsets(problem.cu_seqlens_q, s.batch, s.total_q, s.q_begin);
    repair_offsets(problem.cu_seqlens_k, s.batch, s.total_k, s.k_begin);
  } else {
    for (std::int64_t b = 0; b <= s.batch; ++b) {
      s.q_begin[b] = b * problem.seqlen_q;
      s.k_begin[b] = b * problem.seqlen_k;
    }
  }
  s.block_begin[0] = 0;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    s.block_begin[b + 1] = s.block_begin[b] + count_blocks(s.k_begin[b + 1] - s.k_begin[b], problem.block_size);
  }
}

QueryPlace place_query(const SelectedAttentionProblem& problem, const Sequences& s, std::int64_t q_row) {
  const std::int64_t b = find_sequence(s.q_begin, s.batch, q_row);
  if (b < 0 || b >= s.batch) return {};
  const std::int64_t length_q = s.q_begin[b + 1] - s.q_begin[b];
  const std::int64_t length_k = s.k_begin[b + 1] - s.k_begin[b];
  const std::int64_t position = q_row - s.q_begin[b] + position_of_first_query(problem, b, length_q, length_k);
  const std::int64_t visible_keys = problem.causal ? std::clamp<std::int64_t>(position + 1, 0, length_k) : length_k;
  return {.first_block = s.block_begin[b],
          .num_visible_blocks = count_blocks(visible_keys, problem.block_size),
          .keys = {s.k_begin[b], s.k_begin[b] + visible_keys}};
}

KeyRange keys_of_block(const SelectedAttentionProblem& problem, const Sequences& s, std::int64_t block) {
  const std::int64_t b = find_sequence(s.block_begin, s.batch, block);
  if (b < 0 || b >= s.batch) return {};
  const std::int64_t begin = s.k_begin[b] + (block - s.block_begin[b]) * problem.block_size;
  const std::int64_t left = s.k_begin[b + 1] - begin;
  return {begin, begin + std::min(left, problem.block_size)};
}

}  // namespace nsa::cpu
