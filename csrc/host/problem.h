// What the problems of all operations have in common, and the rules that hold for each of them.
#pragma once

#include "host/status.h"

namespace nsa {

// The fields of a problem that mean the same in every operation.
struct Problem {
  Device device;
  Backend backend;
  Dtype dtype;
  std::int64_t batch, seqlen_q, seqlen_k, num_heads_q, num_heads_k, head_dim_qk, head_dim_v;
  double softmax_scale;
  const std::int32_t *cu_seqlens_q, *cu_seqlens_k, *q_offsets;
  bool has_q_offset;
  std::int64_t q_offset;

  bool packed() const { return cu_seqlens_q != nullptr; }
  std::int64_t copies() const { return packed() ? 1 : batch; }  // tensors are [copies, rows, heads, dim]
};

template <typename AnyProblem>
Problem common_part(const AnyProblem& p) {
  return {p.device,       p.backend,     p.dtype,        p.batch,      p.seqlen_q,      p.seqlen_k,
          p.num_heads_q,  p.num_heads_k, p.head_dim_qk,  p.head_dim_v, p.softmax_scale, p.cu_seqlens_q,
          p.cu_seqlens_k, p.q_offsets,   p.has_q_offset, p.q_offset};
}

template <typename Enum>
bool is_between(Enum value, Enum first, Enum last) {
  return value >= first && value <= last;
}

Status check_at_least(const char* name, std::int64_t value, std::int64_t least);
Status check_aligned(const char* name, const void* pointer, std::uintptr_t alignment);

// a * b, or false past `most`. Both are >= 0.
bool multiply_within(std::int64_t a, std::int64_t b, std::int64_t most, std::int64_t* product);

// How many rows, or blocks, a device can number. CUDA kernels number them in int32; strides and offsets into memory are
// 64-bit everywhere.
std::int64_t most_rows(Device device);

// n is an int, and n integers for each of B * Tq rows and Hkv heads are addressable; `name` is that of n.
Status check_list_entries(const Problem& problem, const char* name, std::int64_t n);

// Everything in Problem.
Status check_common(const Problem& problem);

}  // namespace nsa
