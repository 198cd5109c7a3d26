// nsa_cuda._C: nsa.h for Python. Addresses, sizes, strides and the stream come in as numbers, so no framework is needed
// to build it and one build serves every version of torch. Checks are the library's own.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <nsa_cuda/nsa.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"

namespace nsa_binding {
namespace {

nsa::SelectedAttentionProblem make_problem(int device, int backend, int dtype, std::int64_t batch,
                                           std::int64_t seqlen_q, std::int64_t seqlen_k, std::int64_t num_heads_q,
                                           std::int64_t num_heads_k, std::int64_t head_dim_qk, std::int64_t head_dim_v,
                                           std::int64_t block_size, std::int64_t num_indices, bool causal,
                                           double softmax_scale, Address cu_seqlens_q, Address cu_seqlens_k,
                                           Address q_offsets, bool has_q_offset, std::int64_t q_offset,
                                           const IndicesTuple& indices, const CountsTuple& counts,
                                           std::int64_t block_count) {
  nsa::SelectedAttentionProblem problem;
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
  problem.block_size = block_size;
  problem.num_indices = num_indices;
  problem.causal = causal;
  problem.softmax_scale = softmax_scale;
  problem.cu_seqlens_q = pointer<const std::int32_t>(cu_seqlens_q);
  problem.cu_seqlens_k = pointer<const std::int32_t>(cu_seqlens_k);
  problem.q_offsets = pointer<const std::int32_t>(q_offsets);
  problem.has_q_offset = has_q_offset;
  problem.q_offset = q_offset;
  problem.block_indices = {pointer<const void>(std::get<0>(indices)),
                           index_type(std::get<1>(indices)),
                           std::get<2>(indices),
                           std::get<3>(indices),
                           std::get<4>(indices),
                           std::get<5>(indices)};
  problem.block_counts = {pointer<const void>(std::get<0>(counts)),
                          index_type(std::get<1>(counts)),
                          std::get<2>(counts),
                          std::get<3>(counts),
                          std::get<4>(counts),
                          0};
  problem.block_count = block_count;
  return problem;
}

struct SelectedAttention {
  using Forward = nsa::SelectedAttentionForward;
  using Backward = nsa::SelectedAttentionBackward;
  static nsa::Status workspace(const auto& args, std::size_t* bytes) {
    return nsa::selected_attention_workspace(args, bytes);
  }
  static nsa::Status call(const auto& args) { return nsa::selected_attention(args); }
};

std::string kernel_name(const nsa::SelectedAttentionProblem& problem) {
  char name[256];
  raise_unless_ok(nsa::selected_attention_kernel(problem, name, sizeof(name)));
  return name;
}

using KernelTuple = std::tuple<std::string, int, int, int, int, int, int>;  // name, then KernelTiles in order

KernelTuple as_tuple(const nsa::KernelChoice& choice) {
  const nsa::KernelTiles& tiles = choice.tiles;
  return {choice.name, tiles.query_rows, tiles.keys, tiles.stages, tiles.threads, tiles.shared_memory, tiles.ctas};
}

std::tuple<KernelTuple, KernelTuple, KernelTuple, std::int64_t, std::int64_t> choose_selected_attention(
    const nsa::SelectedAttentionProblem& problem, const std::tuple<int, int, int>& gpu) {
  nsa::SelectedAttentionChoice choice;
  raise_unless_ok(
      nsa::choose_selected_attention(problem, {std::get<0>(gpu), std::get<1>(gpu), std::get<2>(gpu)}, &choice));
  return {as_tuple(choice.forward), as_tuple(choice.dq), as_tuple(choice.dkdv), choice.windows, choice.window_rows};
}

std::vector<std::string> compiled_kernels() {
  std::vector<std::string> kernels;
  for (int i = 0; i < nsa::num_compiled_kernels(); ++i) kernels.emplace_back(nsa::compiled_kernel(i));
  return kernels;
}

}  // namespace

}  // namespace nsa_binding

PYBIND11_MODULE(_C, module) {
  using namespace nsa_binding;
  py::class_<nsa::SelectedAttentionProblem>(module, "Problem").def(py::init(&make_problem));
  // On the CPU every thread has scratch of its own: the call that follows may use as many threads as were named here.
  module.def("forward_workspace", &forward_workspace<SelectedAttention>, py::arg(), py::arg(),
             py::arg("num_threads") = 0);
  module.def("backward_workspace", &backward_workspace<SelectedAttention>, py::arg(), py::arg(), py::arg(), py::arg(),
             py::arg(), py::arg("num_threads") = 0);
  module.def("forward", &forward<SelectedAttention>);
  module.def("backward", &backward<SelectedAttention>);
  bind_gated_sum(module);
  bind_range_attention(module);
  module.def("kernel_name", &kernel_name);
  module.def("choose_selected_attention", &choose_selected_attention);
  module.def("version", &nsa::version);
  module.def("built_with_cuda", &nsa::built_with_cuda);
  module.def("cuda_architectures", &nsa::cuda_architectures);
  module.def("cuda_toolkit", &nsa::cuda_toolkit);
  module.def("compiled_kernels", &compiled_kernels);
}
