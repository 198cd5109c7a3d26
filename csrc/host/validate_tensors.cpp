#include <cinttypes>
#include <limits>

#include "host/problem.h"
#include "host/tensor_view.h"
#include "host/validate.h"

namespace nsa {
namespace {

constexpr int kMaxThreads = 4096;  // past this OpenMP's own failure would end the process

// What the tensors of one call have in common.
class Shapes {
 public:
  explicit Shapes(const Problem& problem) : problem_(problem), batch_(problem.copies()) {}

  View q(const char* name, const Tensor& tensor, Access access) const {
    return make(name, tensor, problem_.seqlen_q, problem_.num_heads_q, problem_.head_dim_qk, access);
  }
  View o(const char* name, const Tensor& tensor, Access access) const {
    return make(name, tensor, problem_.seqlen_q, problem_.num_heads_q, problem_.head_dim_v, access);
  }
  View k(const char* name, const Tensor& tensor, Access access) const {
    return make(name, tensor, problem_.seqlen_k, problem_.num_heads_k, problem_.head_dim_qk, access);
  }
  View v(const char* name, const Tensor& tensor, Access access) const {
    return make(name, tensor, problem_.seqlen_k, problem_.num_heads_k, problem_.head_dim_v, access);
  }
  View lse(const char* name, const Tensor& tensor, Access access) const {
    const std::int64_t bytes = problem_.dtype == Dtype::kFloat64 ? 8 : 4;
    return {name, tensor, batch_, problem_.seqlen_q, problem_.num_heads_q, 1, bytes, bytes, access};
  }
  Status check_gate(const char* name, const GateTensor& gate) const {
    return nsa::check_gate(name, gate, batch_, problem_.seqlen_q, problem_.num_heads_q, Access::kRead);
  }

 private:
  View make(const char* name, const Tensor& tensor, std::int64_t rows, std::int64_t heads, std::int64_t dim,
            Access access) const {
    const std::int64_t bytes = size_of(problem_.dtype);
    return {name,  tensor, batch_, rows, heads, dim, bytes, problem_.device == Device::kCuda ? kCudaAlignment : bytes,
            access};
  }

  Problem problem_;
  std::int64_t batch_;
};

Status check_index_reach(const char* name, const IndexTensor& tensor, std::int64_t batch, std::int64_t rows,
                         std::int64_t heads, std::int64_t entries) {
  std::int64_t reach = 1, bytes;
  if (add_reach(batch, tensor.batch_stride, &reach) && add_reach(rows, tensor.row_stride, &reach) &&
      add_reach(heads, tensor.head_stride, &reach) && add_reach(entries, tensor.entry_stride, &reach) &&
      !__builtin_mul_overflow(reach, std::int64_t{8}, &bytes)) {
    return {};
  }
  return invalid_argument("%s has strides (%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64
                          ") that lead past 2^63 bytes; allowed are strides inside one buffer",
                          name, tensor.batch_stride, tensor.row_stride, tensor.head_stride, tensor.entry_stride);
}

Status check_lists(const SelectedAttentionProblem& problem) {
  const std::int64_t batch = problem.cu_seqlens_q ? 1 : problem.batch;
  if (total_rows(problem).q == 0 || problem.num_indices == 0) return {};
  if (problem.block_indices.data == nullptr) {
    return invalid_argument("block_indices is null; allowed is the address of its [%" PRId64 ", %" PRId64 ", %" PRId64
                            ", %" PRId64 "] entries",
                            batch, problem.seqlen_q, problem.num_heads_k, problem.num_indices);
  }
  NSA_RETURN_IF_ERROR(check_index_reach("block_indices", problem.block_indices, batch, problem.seqlen_q,
                                        problem.num_heads_k, problem.num_indices));
  if (problem.block_counts.data == nullptr) return {};
  return check_index_reach("block_counts", problem.block_counts, batch, problem.seqlen_q, problem.num_heads_k, 1);
}

template <typename Forward>
Status check_forward(const Forward& args) {
  const Shapes shapes(common_part(args.problem));
  NSA_RETURN_IF_ERROR(check_view(shapes.q("q", args.q, Access::kRead)));
  NSA_RETURN_IF_ERROR(check_view(shapes.k("k", args.k, Access::kRead)));
  NSA_RETURN_IF_ERROR(check_view(shapes.v("v", args.v, Access::kRead)));
  NSA_RETURN_IF_ERROR(check_view(shapes.o("o", args.o, Access::kWritten)));
  if (args.lse.data == nullptr) return {};
  return check_view(shapes.lse("lse", args.lse, Access::kWritten));
}

template <typename Backward>
Status check_backward(const Backward& args) {
  const Shapes shapes(common_part(args.problem));
  NSA_RETURN_IF_ERROR(check_view(shapes.q("q", args.q, Access::kRead)));
  NSA_RETURN_IF_ERROR(check_view(shapes.k("k", args.k, Access::kRead)));
  NSA_RETURN_IF_ERROR(check_view(shapes.v("v", args.v, Access::kRead)));
  if (args.delta.data) {
    NSA_RETURN_IF_ERROR(check_view(shapes.lse("delta", args.delta, Access::kRead)));
  } else {
    NSA_RETURN_IF_ERROR(check_view(shapes.o("o", args.o, Access::kRead)));
  }
  NSA_RETURN_IF_ERROR(check_view(shapes.lse("lse", args.lse, Access::kRead)));
  NSA_RETURN_IF_ERROR(check_view(shapes.o("dout", args.dout, Access::kRead)));
  if (args.dlse.data) NSA_RETURN_IF_ERROR(check_view(shapes.lse("dlse", args.dlse, Access::kRead)));
  if (args.gate.data) {
    if (args.dlse.data) return invalid_argument("gate and dlse are both given; allowed is one of them");
    NSA_RETURN_IF_ERROR(shapes.check_gate("gate", args.gate));
  }
  if (args.dq.data) NSA_RETURN_IF_ERROR(check_view(shapes.q("dq", args.dq, Access::kWritten)));
  if (args.dk.data) NSA_RETURN_IF_ERROR(check_view(shapes.k("dk", args.dk, Access::kWritten)));
  if (args.dv.data) NSA_RETURN_IF_ERROR(check_view(shapes.v("dv", args.dv, Access::kWritten)));
  return {};
}

}  // namespace

Status validate_num_threads(int num_threads) {
  if (num_threads >= 0 && num_threads <= kMaxThreads) return {};
  return invalid_argument("num_threads is %d; allowed is 1 to %d, or 0 for OpenMP's default", num_threads, kMaxThreads);
}

Status validate(const SelectedAttentionForward& args) {
  NSA_RETURN_IF_ERROR(validate(args.problem));
  NSA_RETURN_IF_ERROR(validate_num_threads(args.num_threads));
  NSA_RETURN_IF_ERROR(check_lists(args.problem));
  return check_forward(args);
}

Status validate(const SelectedAttentionBackward& args) {
  NSA_RETURN_IF_ERROR(validate(args.problem));
  NSA_RETURN_IF_ERROR(validate_num_threads(args.num_threads));
  NSA_RETURN_IF_ERROR(check_lists(args.problem));
  return check_backward(args);
}

Status validate(const RangeAttentionForward& args) {
  NSA_RETURN_IF_ERROR(validate(args.problem));
  NSA_RETURN_IF_ERROR(validate_num_threads(args.num_threads));
  return check_forward(args);
}

Status validate(const RangeAttentionBackward& args) {
  NSA_RETURN_IF_ERROR(validate(args.problem));
  NSA_RETURN_IF_ERROR(validate_num_threads(args.num_threads));
  return check_backward(args);
}

Status validate(const BlockSelection& args) {
  NSA_RETURN_IF_ERROR(validate_sizes(args));
  NSA_RETURN_IF_ERROR(validate_num_threads(args.num_threads));
  const Problem problem = common_part(args.problem);
  const Shapes shapes(problem);
  NSA_RETURN_IF_ERROR(check_view(shapes.q("q", args.q, Access::kRead)));
  NSA_RETURN_IF_ERROR(check_view(shapes.k("k", args.k, Access::kRead)));
  NSA_RETURN_IF_ERROR(check_view(shapes.lse("lse", args.lse, Access::kRead)));
  if (problem.copies() * problem.seqlen_q == 0) return {};
  if (args.block_indices == nullptr) {
    return invalid_argument("block_indices is null; allowed is the address of its [%" PRId64 ", %" PRId64 ", %" PRId64
                            ", %" PRId64 "] entries",
                            problem.copies(), problem.seqlen_q, problem.num_heads_k, args.topk);
  }
  return check_aligned("block_indices", args.block_indices, sizeof(std::int32_t));
}

Status validate_workspace(Device device, const void* workspace, std::size_t given_bytes, std::size_t needed_bytes) {
  if (given_bytes < needed_bytes) {
    return invalid_argument("workspace_bytes is %zu; this call needs %zu (the workspace query tells)", given_bytes,
                            needed_bytes);
  }
  if (needed_bytes == 0) return {};
  if (workspace == nullptr) return invalid_argument("workspace is null; this call needs %zu bytes", needed_bytes);
  // CPU allocators align to a cache line; CUDA's to 256 bytes.
  const std::uintptr_t alignment = device == Device::kCuda ? 256 : 64;
  if (reinterpret_cast<std::uintptr_t>(workspace) % alignment != 0) {
    return invalid_argument("workspace is %p; allowed on %s is a multiple of %d bytes", workspace, name_of(device),
                            static_cast<int>(alignment));
  }
  return {};
}

}  // namespace nsa
