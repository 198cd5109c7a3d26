// nsa::range_attention and nsa::select_blocks for Python.
#include <cstdint>

#include <nsa_cuda/nsa.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"

namespace nsa_binding {
namespace {

nsa::RangeAttentionProblem make_problem(int device, int backend, int dtype, std::int64_t batch, std::int64_t seqlen_q,
                                        std::int64_t seqlen_k, std::int64_t num_heads_q, std::int64_t num_heads_k,
                                        std::int64_t head_dim_qk, std::int64_t head_dim_v, int mask,
                                        std::int64_t window_size, std::int64_t kernel_size, std::int64_t kernel_stride,
                                        std::int64_t num_tokens, bool causal, double softmax_scale,
                                        Address cu_seqlens_q, Address cu_seqlens_k, Address q_offsets,
                                        bool has_q_offset, std::int64_t q_offset) {
  nsa::RangeAttentionProblem problem;
  problem.device = static_cast<nsa::Device>(device);
  problem.backend = static_cast<nsa::Backend>(backend);
  problem.dtype = static_cast<nsa::Dtype>(dtype);
  problem.batch = batch;
  problem.seqlen_q = seqlen_q;
  problem.seqlen_k = seqlen_k;
  problem.num_heads_q = num_heads_q;
  problem.num_heads_k = num_heads_k;
  problem.head_dim_qk = head_dim_qk;
  problem.head_dim_v = head_dim_v;
  problem.mask = static_cast<nsa::RangeMask>(mask);
  problem.window_size = window_size;
  problem.kernel_size = kernel_size;
  problem.kernel_stride = kernel_stride;
  problem.num_tokens = num_tokens;
  problem.causal = causal;
  problem.softmax_scale = softmax_scale;
  problem.cu_seqlens_q = pointer<const std::int32_t>(cu_seqlens_q);
  problem.cu_seqlens_k = pointer<const std::int32_t>(cu_seqlens_k);
  problem.q_offsets = pointer<const std::int32_t>(q_offsets);
  problem.has_q_offset = has_q_offset;
  problem.q_offset = q_offset;
  return problem;
}

struct RangeAttention {
  using Forward = nsa::RangeAttentionForward;
  using Backward = nsa::RangeAttentionBackward;
  static nsa::Status workspace(const auto& args, std::size_t* bytes) {
    return nsa::range_attention_workspace(args, bytes);
  }
  static nsa::Status call(const auto& args) { return nsa::range_attention(args); }
};

nsa::BlockSelection make_selection(const nsa::RangeAttentionProblem& problem, std::int64_t block_size,
                                   std::int64_t topk, std::int64_t init_blocks, std::int64_t local_blocks) {
  nsa::BlockSelection args;
  args.problem = problem;
  args.block_size = block_size;
  args.topk = topk;
  args.init_blocks = init_blocks;
  args.local_blocks = local_blocks;
  return args;
}

std::size_t selection_workspace(const nsa::RangeAttentionProblem& problem, std::int64_t block_size, std::int64_t topk,
                                std::int64_t init_blocks, std::int64_t local_blocks, int num_threads) {
  nsa::BlockSelection args = make_selection(problem, block_size, topk, init_blocks, local_blocks);
  args.num_threads = num_threads;
  std::size_t bytes = 0;
  raise_unless_ok(nsa::block_selection_workspace(args, &bytes));
  return bytes;
}

void select_blocks(const nsa::RangeAttentionProblem& problem, std::int64_t block_size, std::int64_t topk,
                   std::int64_t init_blocks, std::int64_t local_blocks, const TensorTuple& q, const TensorTuple& k,
                   const TensorTuple& lse, Address block_indices, Address workspace, std::size_t workspace_bytes,
                   Address stream, int num_threads) {
  nsa::BlockSelection args = make_selection(problem, block_size, topk, init_blocks, local_blocks);
  args.q = make_tensor(q);
  args.k = make_tensor(k);
  args.lse = make_tensor(lse);
  args.block_indices = pointer<std::int32_t>(block_indices);
  run(args, &nsa::select_blocks, workspace, workspace_bytes, stream, num_threads);
}

}  // namespace

void bind_range_attention(py::module_& module) {
  py::class_<nsa::RangeAttentionProblem>(module, "RangeProblem").def(py::init(&make_problem));
  module.def("range_forward_workspace", &forward_workspace<RangeAttention>);
  module.def("range_backward_workspace", &backward_workspace<RangeAttention>);
  module.def("range_forward", &forward<RangeAttention>);
  module.def("range_backward", &backward<RangeAttention>);
  module.def("selection_workspace", &selection_workspace);
  module.def("select_blocks", &select_blocks);
}

}  // namespace nsa_binding
