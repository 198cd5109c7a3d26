// Block selection from validated arguments to launches.
#include <cuda_runtime.h>

#include "common/cuda_backend.h"
#include "common/dispatch.h"
#include "common/integers.h"
#include "common/sequences.cuh"

namespace nsa::cuda {
namespace {

// One CTA. Writes every table of a packed plan.
__global__ void __launch_bounds__(kSequenceThreads)
    lay_tiles(const int32_t* cu_q, const int32_t* cu_k, int batch, int64_t kernel_size, int64_t kernel_stride,
              SelectionPlan plan) {
  __shared__ SequenceScan::Scan::TempStorage storage;
  SequenceScan scan(storage);
  scan.repair(cu_q, plan.q_begin, batch, plan.total_q);
  scan.repair(cu_k, plan.key_token_begin, batch, INT_MAX);
  scan.lay_compressed_keys(plan.key_token_begin, batch, kernel_size, kernel_stride, plan.total_k, plan.key_begin);
  scan.lay_runs(plan.q_begin, batch, plan.total_q, plan.token_begin);
  scan.sum_before(batch + 2, plan.tile_begin, [&](int run) {
    const int tokens = plan.token_begin[run + 1] - plan.token_begin[run];
    return tokens / plan.tokens_per_tile + (tokens % plan.tokens_per_tile != 0);
  });
}

// Sizes, and the pieces of the workspace, for a kernel of `groups` groups.
SelectionArgs carve_selection(const BlockSelection& args, int groups, Carver& carver) {
  const RangeAttentionProblem& p = args.problem;
  SelectionArgs a = {};
  a.num_heads_k = static_cast<int>(p.num_heads_k);
  a.group = clamp_int(p.num_heads_q / p.num_heads_k);
  a.kernel_size = p.kernel_size;
  a.kernel_stride = p.kernel_stride;
  a.block_size = args.block_size;
  a.keys_per_block = clamp_int(args.block_size / p.kernel_stride);
  a.overlap = clamp_int(p.kernel_size / p.kernel_stride);
  a.topk = clamp_int(args.topk);
  a.init_blocks = clamp_int(args.init_blocks);
  a.local_blocks = clamp_int(args.local_blocks);
  a.tokens_per_group = a.group < kSelectionRows ? kSelectionRows / a.group : 1;
  a.open_blocks = pools_by_class(a) ? 0 : clamp_int((int64_t{a.overlap} + a.keys_per_block - 2) / a.keys_per_block + 1);
  a.token_bytes = clamp_int(8 * int64_t{a.topk} + 4 * int64_t{a.open_blocks});

  SelectionPlan& plan = a.plan;
  const bool packed = p.cu_seqlens_q != nullptr;
  plan.total_q = static_cast<int>(packed ? p.seqlen_q : p.batch * p.seqlen_q);
  plan.total_k = static_cast<int>(packed ? p.seqlen_k : p.batch * p.seqlen_k);
  plan.tokens_per_tile = groups * a.tokens_per_group;
  plan.runs = static_cast<int>(packed ? p.batch + 2 : p.batch);
  plan.tokens_per_run = static_cast<int>(p.seqlen_q);
  plan.tiles_per_run = static_cast<int>(divide_up(p.seqlen_q, plan.tokens_per_tile));
  plan.max_tiles = packed ? plan.tiles_per_run + plan.runs : plan.runs * plan.tiles_per_run;
  if (packed) {
    plan.q_begin = carver.take<int32_t>(p.batch + 1);
    plan.key_token_begin = carver.take<int32_t>(p.batch + 1);
    plan.key_begin = carver.take<int32_t>(p.batch + 1);
    plan.token_begin = carver.take<int32_t>(plan.runs + 1);
    plan.tile_begin = carver.take<int32_t>(plan.runs + 1);
  }
  const int64_t group_bytes = int64_t{a.tokens_per_group} * a.token_bytes;
  if (group_bytes > kSharedListBytes) a.lists = carver.take<char>(kMaxSelectionCtas * groups * group_bytes);
  return a;
}

// TMA needs keys; the register pooling of the Hopper kernel has one shape.
bool uses_sm90(const BlockSelection& args) {
  Carver nothing(nullptr);
  const SelectionArgs a = carve_selection(args, 1, nothing);
  return args.problem.backend != Backend::kSm80 && pools_by_class(a) && a.plan.total_k > 0;
}

}  // namespace

// The family isn't known without a GPU: room for either.
Status workspace_bytes(const BlockSelection& args, std::size_t* bytes) {
  *bytes = 0;
  for (const Backend family : {Backend::kSm80, Backend::kSm90}) {
    Carver carver(nullptr);
    carve_selection(args, selection_groups(family, args.problem.head_dim_qk), carver);
    if (carver.used() > *bytes) *bytes = carver.used();
  }
  return {};
}

Status select_blocks(const BlockSelection& args) {
  const RangeAttentionProblem& p = args.problem;
  Gpu gpu;
  Status status = query_gpu(args.stream, &gpu);
  const Instance* kernel = nullptr;
  if (status.ok()) {
    status = find_kernel({p.backend, p.dtype, p.head_dim_qk, p.head_dim_qk}, gpu, Operation::select_blocks,
                         uses_sm90(args), &kernel);
  }
  if (!status.ok()) return status;
  Carver carver(args.workspace);
  SelectionArgs a = carve_selection(args, selection_groups(kernel->family, p.head_dim_qk), carver);
  if (int64_t{a.plan.max_tiles} * a.num_heads_k > INT_MAX - 65536) {
    return make_status(StatusCode::kNotSupported,
                       "q has %d rows with num_heads_k %d; the CUDA kernels of block selection take fewer than 2^31 "
                       "(kv head, tile of %d rows) pairs",
                       a.plan.total_q, int{a.num_heads_k}, a.plan.tokens_per_tile);
  }
  if (a.plan.total_q == 0) return {};
  a.q = tensor_arg(args.q, p, p.seqlen_q, 2);
  a.k = tensor_arg(args.k, p, p.seqlen_k, 2);
  a.lse = tensor_arg(args.lse, p, p.seqlen_q, 4);
  a.block_indices = args.block_indices;
  a.q_offsets = p.q_offsets;
  a.has_q_offset = p.has_q_offset;
  a.q_offset = clamp_far(p.q_offset);
  a.causal = p.causal;
  a.scale_log2 = static_cast<float>(p.softmax_scale * kLog2e);
  a.num_tokens = static_cast<int>(p.num_tokens);
  a.num_keys = static_cast<int>(range_keys(p));
  a.run_k = static_cast<int>(p.seqlen_k);
  if (p.cu_seqlens_q) {
    lay_tiles<<<1, kSequenceThreads, 0, args.stream>>>(p.cu_seqlens_q, p.cu_seqlens_k, static_cast<int>(p.batch),
                                                       p.kernel_size, p.kernel_stride, a.plan);
    status = cuda_status(cudaGetLastError(), "block selection: laying tiles");
    if (!status.ok()) return status;
  }
  return kernel->selection(a, gpu.launch);
}

}  // namespace nsa::cuda
