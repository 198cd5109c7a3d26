#include <cinttypes>

#include "host/problem.h"
#include "host/validate.h"

namespace nsa {
namespace {

Status check_block_size(const SelectedAttentionProblem& problem) {
  NSA_RETURN_IF_ERROR(check_at_least("block_size", problem.block_size, 1));
  if (problem.device == Device::kCuda && problem.block_size != 16 && problem.block_size != 32 &&
      problem.block_size != 64 && problem.block_size != 128) {
    return not_supported("block_size is %" PRId64 "; CUDA kernels take 16, 32, 64 or 128", problem.block_size);
  }
  return {};
}

// (kv head, block) lists are numbered like rows.
Status check_blocks(const SelectedAttentionProblem& problem) {
  const std::int64_t most = most_rows(problem.device);
  const bool packed = problem.cu_seqlens_q != nullptr;
  // A packed batch holds at most one partial block for each sequence beside the full ones.
  const std::int64_t full = problem.seqlen_k / problem.block_size;
  const std::int64_t of_copy = !packed && problem.seqlen_k % problem.block_size != 0 ? full + 1 : full;
  std::int64_t blocks, lists;
  if (multiply_within(packed ? 1 : problem.batch, of_copy, most, &blocks) &&
      !__builtin_add_overflow(blocks, packed ? problem.batch : 0, &blocks) &&
      multiply_within(blocks, problem.num_heads_k, most, &lists)) {
    return {};
  }
  return invalid_argument("num_heads_k is %" PRId64 " with block_size %" PRId64 " and %" PRId64
                          " rows of k; allowed are %" PRId64 " (kv head, block) pairs in total on %s",
                          problem.num_heads_k, problem.block_size, total_rows(problem).k, most,
                          name_of(problem.device));
}

Status check_index_type(const char* name, const IndexTensor& tensor) {
  if (!is_between(tensor.type, IndexType::kInt32, IndexType::kInt64)) {
    return invalid_argument("%s.type is %d; allowed are 0 (int32) and 1 (int64)", name, static_cast<int>(tensor.type));
  }
  return check_aligned(name, tensor.data, tensor.type == IndexType::kInt64 ? 8 : 4);
}

Status check_lists(const SelectedAttentionProblem& problem) {
  NSA_RETURN_IF_ERROR(check_index_type("block_indices", problem.block_indices));
  NSA_RETURN_IF_ERROR(check_index_type("block_counts", problem.block_counts));
  if (problem.block_counts.data != nullptr && problem.block_counts.type != IndexType::kInt32) {
    return invalid_argument("block_counts is int64; allowed is int32");
  }
  if (problem.block_count < -1) {
    return invalid_argument("block_count is %" PRId64 "; allowed is 0 or more, or -1 for num_indices",
                            problem.block_count);
  }
  return {};
}

}  // namespace

Rows total_rows(const SelectedAttentionProblem& problem) {
  const std::int64_t copies = common_part(problem).copies();
  return {copies * problem.seqlen_q, copies * problem.seqlen_k};
}

Status validate(const SelectedAttentionProblem& problem) {
  const Problem common = common_part(problem);
  NSA_RETURN_IF_ERROR(check_common(common));
  NSA_RETURN_IF_ERROR(check_block_size(problem));
  NSA_RETURN_IF_ERROR(check_at_least("num_indices", problem.num_indices, 0));
  NSA_RETURN_IF_ERROR(check_blocks(problem));
  NSA_RETURN_IF_ERROR(check_list_entries(common, "num_indices", problem.num_indices));
  return check_lists(problem);
}

}  // namespace nsa
