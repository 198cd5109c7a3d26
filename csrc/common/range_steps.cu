// Adds up the partial tiles of dK and dV that split runs left, always in the same order.
#include <cuda_runtime.h>

#include "common/range_args.h"
#include "device/range_tile.cuh"

namespace nsa::cuda {
namespace {

using device::Half;

// One CTA a (key tile, part of it, kv head); tiles in one piece have written dk and dv themselves.
template <typename Element, int kKeys>
__global__ void __launch_bounds__(256) sum_range_partials(RangeBackwardArgs a, int dk, int dv) {
  const device::RangeItem<kKeys> item(a.plan, blockIdx.z, blockIdx.x, 0);
  if (!item.exists || item.num_partials <= 1) return;
  const int dims = dk + dv;
  const int64_t tile = static_cast<int64_t>(kKeys) * dims;
  const float* first = a.partials + static_cast<int64_t>(item.first_partial) * tile;
  for (int i = 4 * (blockIdx.y * blockDim.x + threadIdx.x); i < item.keys * dims; i += 4 * gridDim.y * blockDim.x) {
    const int key = i / dims, dim = i - key * dims;
    float4 sum = {0, 0, 0, 0};
    for (int c = 0; c < item.num_partials; ++c) {
      const float4 x = *reinterpret_cast<const float4*>(first + c * tile + i);
      sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    }
    const bool is_k = dim < dk;
    const TensorArg& out = is_k ? a.dk : a.dv;
    if (!out.data) continue;
    const float scale = is_k ? a.scale : 1.f;
    *reinterpret_cast<uint2*>(out.at(item.first_key + key, item.head) + 2 * (is_k ? dim : dim - dk)) = {
        Half<Element>::pack(sum.x * scale, sum.y * scale), Half<Element>::pack(sum.z * scale, sum.w * scale)};
  }
}

}  // namespace

Status add_range_partials(Dtype dtype, const RangeBackwardArgs& args, int dk, int dv, cudaStream_t stream) {
  if (args.plan.max_partials == 0) return {};
  const int keys = 16 * args.plan.key_units.alignment;
  const dim3 grid(args.plan.key_units.max_units / args.plan.key_units.alignment, 8, args.num_heads_k);
  const bool bf16 = dtype == Dtype::kBFloat16;
  auto* kernel = keys == 64 ? bf16 ? sum_range_partials<__nv_bfloat16, 64> : sum_range_partials<__half, 64>
                 : bf16     ? sum_range_partials<__nv_bfloat16, 128>
                            : sum_range_partials<__half, 128>;
  kernel<<<grid, 256, 0, stream>>>(args, dk, dv);
  return cuda_status(cudaGetLastError(), "range attention backward: adding partial tiles");
}

}  // namespace nsa::cuda
