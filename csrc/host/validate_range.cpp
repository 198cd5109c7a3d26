#include <cinttypes>
#include <limits>

#include "host/problem.h"
#include "host/validate.h"

namespace nsa {
namespace {

Status check_window(const RangeAttentionProblem& problem) {
  return check_at_least("window_size", problem.window_size, 1);
}

Status check_compression(const RangeAttentionProblem& problem) {
  NSA_RETURN_IF_ERROR(check_at_least("kernel_size", problem.kernel_size, 1));
  NSA_RETURN_IF_ERROR(check_at_least("kernel_stride", problem.kernel_stride, 1));
  if (problem.kernel_size % problem.kernel_stride != 0) {
    return invalid_argument("kernel_stride is %" PRId64 "; allowed is a divisor of kernel_size, which is %" PRId64,
                            problem.kernel_stride, problem.kernel_size);
  }
  if (problem.cu_seqlens_q != nullptr) return {};
  NSA_RETURN_IF_ERROR(check_at_least("num_tokens", problem.num_tokens, 0));
  if (problem.num_tokens > most_rows(problem.device)) {
    return invalid_argument("num_tokens is %" PRId64 "; allowed on %s is %" PRId64 " or less", problem.num_tokens,
                            name_of(problem.device), most_rows(problem.device));
  }
  const std::int64_t number = problem.num_tokens < problem.kernel_size
                                  ? 0
                                  : (problem.num_tokens - problem.kernel_size) / problem.kernel_stride + 1;
  if (problem.seqlen_k < number) {
    return invalid_argument("seqlen_k is %" PRId64 "; allowed is %" PRId64
                            " or more, the compressed keys of num_tokens = %" PRId64 " tokens",
                            problem.seqlen_k, number, problem.num_tokens);
  }
  return {};
}

// A block's score is a sum over (l + l') / d - 1 compressed keys; every thread of the CPU keeps that many at hand.
Status check_strides(const char* name, std::int64_t tokens, std::int64_t stride) {
  constexpr std::int64_t kMost = 65536;
  if (tokens / stride <= kMost) return {};
  return invalid_argument("%s is %" PRId64 "; allowed is %" PRId64 " times kernel_stride, which is %" PRId64
                          ", or less",
                          name, tokens, kMost, stride);
}

}  // namespace

Status validate(const RangeAttentionProblem& problem) {
  NSA_RETURN_IF_ERROR(check_common(common_part(problem)));
  switch (problem.mask) {
    case RangeMask::kWindow:
      return check_window(problem);
    case RangeMask::kCompressed:
      return check_compression(problem);
  }
  return invalid_argument("mask is %d; allowed are 0 (window) and 1 (compressed)", static_cast<int>(problem.mask));
}

Status validate_sizes(const BlockSelection& args) {
  RangeAttentionProblem problem = args.problem;
  problem.head_dim_v = problem.head_dim_qk;  // no v takes part
  NSA_RETURN_IF_ERROR(validate(problem));
  if (problem.mask != RangeMask::kCompressed) {
    return invalid_argument("mask is window; blocks are selected from compressed keys, so compressed is allowed");
  }
  NSA_RETURN_IF_ERROR(check_at_least("block_size", args.block_size, 1));
  NSA_RETURN_IF_ERROR(check_at_least("topk", args.topk, 1));
  NSA_RETURN_IF_ERROR(check_at_least("init_blocks", args.init_blocks, 0));
  NSA_RETURN_IF_ERROR(check_at_least("local_blocks", args.local_blocks, 0));
  if (args.block_size % problem.kernel_stride != 0) {
    return invalid_argument("block_size is %" PRId64 "; allowed is a multiple of kernel_stride, which is %" PRId64,
                            args.block_size, problem.kernel_stride);
  }
  if (args.init_blocks > args.topk || args.local_blocks > args.topk - args.init_blocks) {
    return invalid_argument("topk is %" PRId64 "; allowed is init_blocks + local_blocks = %" PRId64 " + %" PRId64
                            " or more",
                            args.topk, args.init_blocks, args.local_blocks);
  }
  NSA_RETURN_IF_ERROR(check_strides("kernel_size", problem.kernel_size, problem.kernel_stride));
  NSA_RETURN_IF_ERROR(check_strides("block_size", args.block_size, problem.kernel_stride));
  constexpr std::int64_t kMaxId = std::numeric_limits<std::int32_t>::max();
  if (problem.cu_seqlens_q == nullptr && problem.num_tokens / args.block_size >= kMaxId) {
    return invalid_argument("num_tokens is %" PRId64 " with block_size %" PRId64 "; allowed are 2^31 - 1 blocks",
                            problem.num_tokens, args.block_size);
  }
  return check_list_entries(common_part(problem), "topk", args.topk);
}

}  // namespace nsa
