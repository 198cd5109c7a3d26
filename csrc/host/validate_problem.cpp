#include <cinttypes>
#include <cmath>
#include <limits>

#include "host/validate.h"

namespace nsa {
namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

bool is_packed(const SelectedAttentionProblem& problem) { return problem.cu_seqlens_q != nullptr; }

template <typename Enum>
bool is_between(Enum value, Enum first, Enum last) {
  return value >= first && value <= last;
}

Status check_enums(const SelectedAttentionProblem& problem) {
  if (!is_between(problem.device, Device::kCpu, Device::kCuda)) {
    return invalid_argument("device is %d; allowed are 0 (cpu) and 1 (cuda)", static_cast<int>(problem.device));
  }
  if (!is_between(problem.backend, Backend::kAuto, Backend::kSm90)) {
    return invalid_argument("backend is %d; allowed are 0 (auto), 1 (cpu), 2 (sm80) and 3 (sm90)",
                            static_cast<int>(problem.backend));
  }
  if (!is_between(problem.dtype, Dtype::kFloat64, Dtype::kFloat16)) {
    return invalid_argument("dtype is %d; allowed are 0 (float64), 1 (float32), 2 (bfloat16) and 3 (float16)",
                            static_cast<int>(problem.dtype));
  }
  return {};
}

Status check_device(const SelectedAttentionProblem& problem) {
  const bool on_cpu = problem.device == Device::kCpu;
  if (on_cpu && is_between(problem.backend, Backend::kSm80, Backend::kSm90)) {
    return invalid_argument("backend is %s, which runs on cuda; for device cpu auto and cpu are allowed",
                            name_of(problem.backend));
  }
  if (!on_cpu && problem.backend == Backend::kCpu) {
    return invalid_argument("backend is cpu, which runs on cpu; for device cuda auto, sm80 and sm90 are allowed");
  }
  if (on_cpu) return {};
  if (!built_with_cuda()) {
    return not_supported(
        "device is cuda, but this build of nsa_cuda %s has the CPU backend alone; reinstall it from source where nvcc "
        "is "
        "found, with FORCE_CUDA=1 set if no GPU is visible there: FORCE_CUDA=1 pip install --force-reinstall --no-deps "
        ".",
        version());
  }
  if (!is_between(problem.dtype, Dtype::kBFloat16, Dtype::kFloat16)) {
    return not_supported("dtype is %s; CUDA kernels take bfloat16 or float16", name_of(problem.dtype));
  }
  return {};
}

Status check_at_least(const char* name, std::int64_t value, std::int64_t least) {
  if (value >= least) return {};
  return invalid_argument("%s is %" PRId64 "; allowed is %" PRId64 " or more", name, value, least);
}

Status check_sizes(const SelectedAttentionProblem& problem) {
  NSA_RETURN_IF_ERROR(check_at_least("batch", problem.batch, 0));
  NSA_RETURN_IF_ERROR(check_at_least("seqlen_q", problem.seqlen_q, 0));
  NSA_RETURN_IF_ERROR(check_at_least("seqlen_k", problem.seqlen_k, 0));
  NSA_RETURN_IF_ERROR(check_at_least("num_heads_q", problem.num_heads_q, 1));
  NSA_RETURN_IF_ERROR(check_at_least("num_heads_k", problem.num_heads_k, 1));
  NSA_RETURN_IF_ERROR(check_at_least("head_dim_qk", problem.head_dim_qk, 1));
  NSA_RETURN_IF_ERROR(check_at_least("head_dim_v", problem.head_dim_v, 1));
  NSA_RETURN_IF_ERROR(check_at_least("block_size", problem.block_size, 1));
  NSA_RETURN_IF_ERROR(check_at_least("num_indices", problem.num_indices, 0));
  if (problem.num_heads_q % problem.num_heads_k != 0) {
    return invalid_argument("num_heads_q is %" PRId64 "; allowed is a multiple of num_heads_k, which is %" PRId64,
                            problem.num_heads_q, problem.num_heads_k);
  }
  if (problem.device == Device::kCuda && problem.block_size != 16 && problem.block_size != 32 &&
      problem.block_size != 64 && problem.block_size != 128) {
    return not_supported("block_size is %" PRId64 "; CUDA kernels take 16, 32, 64 or 128", problem.block_size);
  }
  return {};
}

// a * b, or false past `most`. Both are >= 0.
bool multiply(std::int64_t a, std::int64_t b, std::int64_t most, std::int64_t* product) {
  return !__builtin_mul_overflow(a, b, product) && *product <= most;
}

// CUDA kernels number rows and (kv head, block) lists in int32; strides and offsets into memory are 64-bit everywhere.
Status check_totals(const SelectedAttentionProblem& problem) {
  const bool on_cuda = problem.device == Device::kCuda;
  const std::int64_t most = on_cuda ? kMaxInt32 : std::numeric_limits<std::int64_t>::max();
  const char* const kind = is_packed(problem) ? "packed" : "batched";
  const std::int64_t copies = is_packed(problem) ? 1 : problem.batch;
  std::int64_t rows_q, rows_k, elements, lists;
  if (!multiply(copies, problem.seqlen_q, most, &rows_q)) {
    return invalid_argument("batch is %" PRId64 " and seqlen_q %" PRId64 " (%s); allowed are %" PRId64
                            " rows of q in total on %s",
                            problem.batch, problem.seqlen_q, kind, most, name_of(problem.device));
  }
  if (!multiply(copies, problem.seqlen_k, most, &rows_k)) {
    return invalid_argument("batch is %" PRId64 " and seqlen_k %" PRId64 " (%s); allowed are %" PRId64
                            " rows of k in total on %s",
                            problem.batch, problem.seqlen_k, kind, most, name_of(problem.device));
  }
  // A packed batch holds at most one partial block for each sequence beside the full ones.
  const std::int64_t full_blocks = problem.seqlen_k / problem.block_size;
  const std::int64_t blocks_of_copy = is_packed(problem)                           ? full_blocks
                                      : problem.seqlen_k % problem.block_size != 0 ? full_blocks + 1
                                                                                   : full_blocks;
  std::int64_t blocks;
  const bool blocks_fit = multiply(copies, blocks_of_copy, most, &blocks) &&
                          !__builtin_add_overflow(blocks, is_packed(problem) ? problem.batch : 0, &blocks);
  if (!blocks_fit || !multiply(blocks, problem.num_heads_k, most, &lists)) {
    return invalid_argument("num_heads_k is %" PRId64 " with block_size %" PRId64 " and %" PRId64
                            " rows of k; allowed are %" PRId64 " (kv head, block) pairs in total on %s",
                            problem.num_heads_k, problem.block_size, rows_k, most, name_of(problem.device));
  }
  std::int64_t entries;
  if (!multiply(rows_q, problem.num_heads_k, std::numeric_limits<std::int64_t>::max(), &elements) ||
      !multiply(elements, problem.num_indices, std::numeric_limits<std::int64_t>::max() / 64, &entries)) {
    return invalid_argument("num_indices is %" PRId64 " with %" PRId64 " rows of q and num_heads_k %" PRId64
                            "; allowed are 2^57 entries of block_indices",
                            problem.num_indices, rows_q, problem.num_heads_k);
  }
  return {};
}

Status check_aligned(const char* name, const void* pointer, std::uintptr_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0) return {};
  return invalid_argument("%s is %p; allowed is a multiple of %d bytes", name, pointer, static_cast<int>(alignment));
}

Status check_sequences(const SelectedAttentionProblem& problem) {
  if ((problem.cu_seqlens_q == nullptr) != (problem.cu_seqlens_k == nullptr)) {
    return invalid_argument("%s is null and %s is not; allowed are both or neither",
                            problem.cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q",
                            problem.cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k");
  }
  NSA_RETURN_IF_ERROR(check_aligned("cu_seqlens_q", problem.cu_seqlens_q, sizeof(std::int32_t)));
  NSA_RETURN_IF_ERROR(check_aligned("cu_seqlens_k", problem.cu_seqlens_k, sizeof(std::int32_t)));
  NSA_RETURN_IF_ERROR(check_aligned("q_offsets", problem.q_offsets, sizeof(std::int32_t)));
  if (problem.q_offsets != nullptr && problem.has_q_offset) {
    return invalid_argument("q_offsets and q_offset (%" PRId64 ") are both given; allowed is one of them",
                            problem.q_offset);
  }
  // As wide as an entry of q_offsets, so that t + q_offset never overflows 64 bits.
  if (problem.has_q_offset && (problem.q_offset > kMaxInt32 || problem.q_offset < -kMaxInt32 - 1)) {
    return invalid_argument("q_offset is %" PRId64 "; allowed is -2147483648 to 2147483647", problem.q_offset);
  }
  return {};
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
  const std::int64_t copies = is_packed(problem) ? 1 : problem.batch;
  return {copies * problem.seqlen_q, copies * problem.seqlen_k};
}

Status validate(const SelectedAttentionProblem& problem) {
  NSA_RETURN_IF_ERROR(check_enums(problem));
  NSA_RETURN_IF_ERROR(check_device(problem));
  NSA_RETURN_IF_ERROR(check_sizes(problem));
  NSA_RETURN_IF_ERROR(check_sequences(problem));
  NSA_RETURN_IF_ERROR(check_totals(problem));
  NSA_RETURN_IF_ERROR(check_lists(problem));
  if (!std::isfinite(problem.softmax_scale)) {
    return invalid_argument("softmax_scale is %g; allowed is a finite number", problem.softmax_scale);
  }
  return {};
}

}  // namespace nsa
