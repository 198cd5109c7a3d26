// What the backends of the operations share: the GPU, and the kernel that fits it.
#pragma once

#include "common/gates.cuh"
#include "common/instances.h"

namespace nsa::cuda {

inline constexpr double kLog2e = 1.4426950408889634;

struct Gpu {
  Launch launch;
  int major, minor;
};

Status query_gpu(cudaStream_t stream, Gpu* gpu);
// Whether it is new enough.
Status check_gpu(const Gpu& gpu);

struct KernelRequest {
  Backend backend;
  Dtype dtype;
  int64_t head_dim_qk, head_dim_v;
};

// The compiled kernel for this GPU: the Hopper one where uses_sm90 says that it is worth it and there is one.
Status find_kernel(const KernelRequest& request, const Gpu& gpu, Operation operation, bool uses_sm90,
                   const Instance** found);

// Rows of one kv head: tokens times G.
Status check_rows(int64_t rows);

// What every attention kernel takes from its call, whoever may see whom.
template <typename Call, typename Args>
void set_inputs(const Call& call, Args& a) {
  const auto& p = call.problem;
  a.q = tensor_arg(call.q, p, p.seqlen_q, 2);
  a.k = tensor_arg(call.k, p, p.seqlen_k, 2);
  a.v = tensor_arg(call.v, p, p.seqlen_k, 2);
  a.num_heads_k = static_cast<int>(p.num_heads_k);
  a.group = static_cast<int>(p.num_heads_q / p.num_heads_k);
  a.scale_log2 = static_cast<float>(p.softmax_scale * kLog2e);
}

template <typename Call, typename Args>
void set_forward_arguments(const Call& call, Args& a) {
  const auto& p = call.problem;
  set_inputs(call, a);
  a.o = tensor_arg(call.o, p, p.seqlen_q, 2);
  a.lse = tensor_arg(call.lse, p, p.seqlen_q, 4);
}

template <typename Call, typename Args>
void set_backward_arguments(const Call& call, Args& a) {
  const auto& p = call.problem;
  set_inputs(call, a);
  a.dout = tensor_arg(call.dout, p, p.seqlen_q, 2);
  a.dq = tensor_arg(call.dq, p, p.seqlen_q, 2);
  a.dk = tensor_arg(call.dk, p, p.seqlen_k, 2);
  a.dv = tensor_arg(call.dv, p, p.seqlen_k, 2);
  a.scale = static_cast<float>(p.softmax_scale);
  a.accumulate_dq = call.accumulate_dq;
}

// The place of a.stats and a.negative.
template <typename Call, typename Args>
void carve_stats(const Call& call, Carver& carver, Args& a) {
  a.stats = carver.take<RowStats>(static_cast<int64_t>(a.plan.total_q) * call.problem.num_heads_q);
  a.negative = carver.take<int>(1);
}

// Fills them; behind set_backward_arguments().
template <typename Call, typename Args>
Status make_stats(const Call& call, Args& a) {
  const auto& p = call.problem;
  if (!call.gate.data || a.plan.total_q == 0) a.negative = nullptr;
  if (a.plan.total_q == 0) return {};
  const GateTensor& gate = call.gate;
  StatsInputs in = {};
  in.o = tensor_arg(call.o, p, p.seqlen_q, 2);
  in.dout = a.dout;
  in.lse = tensor_arg(call.lse, p, p.seqlen_q, 4);
  in.dlse = tensor_arg(call.dlse, p, p.seqlen_q, 4);
  in.delta = tensor_arg(call.delta, p, p.seqlen_q, 4);
  in.gate = tensor_arg({gate.data, gate.batch_stride, gate.row_stride, gate.head_stride}, p, p.seqlen_q,
                       bytes_of_gate(gate.dtype));
  in.gate_dtype = gate.dtype;
  return make_row_stats(p.dtype, in, a.plan.total_q, static_cast<int>(p.num_heads_q), static_cast<int>(p.head_dim_v),
                        const_cast<RowStats*>(a.stats), const_cast<int*>(a.negative), call.stream);
}

// Whether a backward call asks for gradients of the keys.
template <typename Call>
bool wants_keys(const Call& call) {
  return call.dk.data || call.dv.data;
}

}  // namespace nsa::cuda
