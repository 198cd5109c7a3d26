#include "host/problem.h"

#include <cinttypes>
#include <cmath>
#include <limits>

namespace nsa {
namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

Status check_enums(const Problem& problem) {
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

Status check_device(const Problem& problem) {
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
        "is found, with FORCE_CUDA=1 set if no GPU is visible there: FORCE_CUDA=1 pip install --force-reinstall "
        "--no-deps "
        ".",
        version());
  }
  if (!is_between(problem.dtype, Dtype::kBFloat16, Dtype::kFloat16)) {
    return not_supported("dtype is %s; CUDA kernels take bfloat16 or float16", name_of(problem.dtype));
  }
  return {};
}

Status check_sizes(const Problem& problem) {
  NSA_RETURN_IF_ERROR(check_at_least("batch", problem.batch, 0));
  NSA_RETURN_IF_ERROR(check_at_least("seqlen_q", problem.seqlen_q, 0));
  NSA_RETURN_IF_ERROR(check_at_least("seqlen_k", problem.seqlen_k, 0));
  NSA_RETURN_IF_ERROR(check_at_least("num_heads_q", problem.num_heads_q, 1));
  NSA_RETURN_IF_ERROR(check_at_least("num_heads_k", problem.num_heads_k, 1));
  NSA_RETURN_IF_ERROR(check_at_least("head_dim_qk", problem.head_dim_qk, 1));
  NSA_RETURN_IF_ERROR(check_at_least("head_dim_v", problem.head_dim_v, 1));
  if (problem.num_heads_q % problem.num_heads_k != 0) {
    return invalid_argument("num_heads_q is %" PRId64 "; allowed is a multiple of num_heads_k, which is %" PRId64,
                            problem.num_heads_q, problem.num_heads_k);
  }
  return {};
}

Status check_rows(const Problem& problem, const char* letter, const char* name, std::int64_t seqlen) {
  const std::int64_t most = most_rows(problem.device);
  std::int64_t rows;
  if (multiply_within(problem.copies(), seqlen, most, &rows)) return {};
  return invalid_argument(
      "batch is %" PRId64 " and %s %" PRId64 " (%s); allowed are %" PRId64 " rows of %s in total on %s", problem.batch,
      name, seqlen, problem.packed() ? "packed" : "batched", most, letter, name_of(problem.device));
}

Status check_sequences(const Problem& problem) {
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

}  // namespace

Status check_at_least(const char* name, std::int64_t value, std::int64_t least) {
  if (value >= least) return {};
  return invalid_argument("%s is %" PRId64 "; allowed is %" PRId64 " or more", name, value, least);
}

Status check_aligned(const char* name, const void* pointer, std::uintptr_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0) return {};
  return invalid_argument("%s is %p; allowed is a multiple of %d bytes", name, pointer, static_cast<int>(alignment));
}

bool multiply_within(std::int64_t a, std::int64_t b, std::int64_t most, std::int64_t* product) {
  return !__builtin_mul_overflow(a, b, product) && *product <= most;
}

std::int64_t most_rows(Device device) {
  return device == Device::kCuda ? kMaxInt32 : std::numeric_limits<std::int64_t>::max();
}

Status check_list_entries(const Problem& problem, const char* name, std::int64_t n) {
  constexpr std::int64_t kMost = kMaxInt32 - 63;  // a warp goes 32 on
  if (n > kMost) {
    return invalid_argument("%s is %" PRId64 "; allowed are %" PRId64 " entries a row", name, n, kMost);
  }
  const std::int64_t rows = problem.copies() * problem.seqlen_q;
  std::int64_t lists, entries;
  if (multiply_within(rows, problem.num_heads_k, std::numeric_limits<std::int64_t>::max(), &lists) &&
      multiply_within(lists, n, std::numeric_limits<std::int64_t>::max() / 64, &entries)) {
    return {};
  }
  return invalid_argument("%s is %" PRId64 " with %" PRId64 " rows of q and num_heads_k %" PRId64
                          "; allowed are 2^57 entries of block_indices",
                          name, n, rows, problem.num_heads_k);
}

Status check_common(const Problem& problem) {
  NSA_RETURN_IF_ERROR(check_enums(problem));
  NSA_RETURN_IF_ERROR(check_device(problem));
  NSA_RETURN_IF_ERROR(check_sizes(problem));
  NSA_RETURN_IF_ERROR(check_sequences(problem));
  NSA_RETURN_IF_ERROR(check_rows(problem, "q", "seqlen_q", problem.seqlen_q));
  NSA_RETURN_IF_ERROR(check_rows(problem, "k", "seqlen_k", problem.seqlen_k));
  if (!std::isfinite(problem.softmax_scale)) {
    return invalid_argument("softmax_scale is %g; allowed is a finite number", problem.softmax_scale);
  }
  return {};
}

}  // namespace nsa
