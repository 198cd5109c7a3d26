// Range attention (compressed and sliding-window branch) from validated arguments to launches.
#include <cuda_runtime.h>

#include "common/cuda_backend.h"
#include "common/dispatch.h"

namespace nsa::cuda {
namespace {

// TMA brings the heads of a group in boxes of 64 rows, so G has to divide 64; other groups take the sm80 kernels.
bool uses_sm90(const RangeAttentionProblem& p) {
  return p.backend != Backend::kSm80 && 64 % (p.num_heads_q / p.num_heads_k) == 0;
}

Status find(const RangeAttentionProblem& p, const Gpu& gpu, Operation operation, const Instance** found) {
  return find_kernel({p.backend, p.dtype, p.head_dim_qk, p.head_dim_v}, gpu, operation, uses_sm90(p), found);
}

RangeBackwardArgs carve_backward(const RangeAttentionBackward& args, Backend family, Carver& carver) {
  const RangeAttentionProblem& p = args.problem;
  RangeBackwardArgs a = {};
  const RangeTiles tiles = range_tiles(family, true, p.head_dim_qk);
  a.plan = carve_range_plan(p, tiles, carver);
  carve_stats(args, carver, a);
  if (wants_keys(args)) {
    const int64_t partials = p.num_heads_k * a.plan.max_partials;
    a.partials = carver.take<float>(partials * 16 * tiles.key_units * (p.head_dim_qk + p.head_dim_v));
  }
  return a;
}

Status run_keys(const RangeAttentionBackward& args, const Gpu& gpu, const Instance& kernel,
                const RangeBackwardArgs& a) {
  const RangeAttentionProblem& p = args.problem;
  if (a.plan.total_k == 0) return {};
  Status status = kernel.range_backward(a, gpu.launch);
  if (status.ok()) {
    status =
        add_range_partials(p.dtype, a, static_cast<int>(p.head_dim_qk), static_cast<int>(p.head_dim_v), args.stream);
  }
  return status;
}

}  // namespace

Status workspace_bytes(const RangeAttentionForward& args, std::size_t* bytes) {
  Carver carver(nullptr);
  carve_range_plan(args.problem, range_tiles(Backend::kSm80, false, args.problem.head_dim_qk), carver);
  *bytes = carver.used();
  return {};
}

// The family isn't known without a GPU: room for either.
Status workspace_bytes(const RangeAttentionBackward& args, std::size_t* bytes) {
  *bytes = 0;
  for (const Backend family : {Backend::kSm80, Backend::kSm90}) {
    Carver carver(nullptr);
    carve_backward(args, family, carver);
    if (carver.used() > *bytes) *bytes = carver.used();
  }
  return {};
}

Status range_attention(const RangeAttentionForward& args) {
  const RangeAttentionProblem& p = args.problem;
  Gpu gpu;
  Status status = query_gpu(args.stream, &gpu);
  const Instance* kernel = nullptr;
  if (status.ok()) status = find(p, gpu, Operation::range_forward, &kernel);
  if (!status.ok()) return status;
  Carver carver(args.workspace);
  RangeForwardArgs a = {};
  set_forward_arguments(args, a);
  a.plan = carve_range_plan(p, range_tiles(kernel->family, false, p.head_dim_qk), carver);
  status = check_rows(static_cast<int64_t>(a.plan.total_q) * a.group);
  if (!status.ok() || a.plan.total_q == 0) return status;
  status = make_range_plan(p, a.plan, args.stream);
  if (!status.ok()) return status;
  return kernel->range_forward(a, gpu.launch);
}

Status range_attention(const RangeAttentionBackward& args) {
  const RangeAttentionProblem& p = args.problem;
  Gpu gpu;
  Status status = query_gpu(args.stream, &gpu);
  const Instance *dq = nullptr, *dkdv = nullptr;
  if (status.ok()) status = find(p, gpu, Operation::range_dq, &dq);
  if (status.ok()) status = find(p, gpu, Operation::range_dkdv, &dkdv);
  if (!status.ok()) return status;
  Carver carver(args.workspace);
  RangeBackwardArgs a = carve_backward(args, dkdv->family, carver);
  set_backward_arguments(args, a);
  status = check_rows(static_cast<int64_t>(a.plan.total_q) * a.group);
  if (!status.ok()) return status;
  status = make_range_plan(p, a.plan, args.stream);
  if (status.ok()) status = make_stats(args, a);
  if (status.ok() && wants_keys(args)) status = run_keys(args, gpu, *dkdv, a);
  if (status.ok() && args.dq.data && a.plan.total_q > 0) status = dq->range_backward(a, gpu.launch);
  return status;
}

}  // namespace nsa::cuda
