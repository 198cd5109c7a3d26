// The arguments of the range attention kernels.
#pragma once

#include "common/kernel_args.h"
#include "common/range_plan.h"

namespace nsa::cuda {

struct RangeForwardArgs {
  RangePlan plan;
  TensorArg q, k, v, o;
  TensorArg lse;               // float; data null: not wanted
  Divisor num_heads_k, group;  // Hkv, G
  float scale_log2;            // softmax_scale * log2(e)
};

struct RangeBackwardArgs {
  RangePlan plan;
  TensorArg q, k, v, dout;
  TensorArg dq, dk, dv;   // data null: not wanted
  const RowStats* stats;  // [total_q, Hq]
  const int* negative;    // whether the gate of any row is; null: no
  float* partials;        // [Hkv, max_partials, keys of a tile, Dk + Dv]
  Divisor num_heads_k, group;
  float scale, scale_log2;
  bool accumulate_dq;
};

using RangeForwardKernel = Status (*)(const RangeForwardArgs&, const Launch&);
using RangeBackwardKernel = Status (*)(const RangeBackwardArgs&, const Launch&);

// Rows of the tiles of a family's kernels, for the plan; the kernels' configs assert that they agree.
constexpr RangeTiles range_tiles(Backend family, bool backward, int64_t dk) {
  if (family == Backend::kSm90) return {backward && dk <= 64 ? 12 : 8, dk <= 192 ? 8 : 4};
  return {dk <= 128 ? 8 : 4, 4};
}

// common/range_steps.cu
Status add_range_partials(Dtype dtype, const RangeBackwardArgs& args, int dk, int dv, cudaStream_t stream);

}  // namespace nsa::cuda
