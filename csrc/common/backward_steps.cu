// The backward's steps around the two attention kernels: delta before them; the sum of partial tiles and the zeros of
// keys that belong to no sequence behind them.
#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "common/gates.cuh"
#include "common/integers.h"
#include "common/kernel_args.h"
#include "device/ptx.cuh"
#include "device/row_stats.cuh"

namespace nsa::cuda {
namespace {

using device::Half;
using device::kFullWarp;

constexpr float kLog2e = 1.4426950408889634f;

// Of a (row, head), from the sum of dout o. Behind a gate g of any sign, g P stands for P: dV = (g P)^T dO and
// dS = g P (dP - delta), so that nobody needs g dO.
__device__ __forceinline__ RowStats stats_of(const StatsInputs& in, int row, int head, float delta, int* negative) {
  const float lse = *reinterpret_cast<const float*>(in.lse.at(row, head));
  if (lse == -INFINITY) return {INFINITY, 0.f};  // dead: its dout, dlse and gate may hold anything
  float lse2 = lse * kLog2e;
  if (in.dlse.data) delta -= *reinterpret_cast<const float*>(in.dlse.at(row, head));
  delta = device::with_sign(delta, false);
  if (in.gate.data) {
    const float gate = load_gate(in.gate_dtype, in.gate.at(row, head));
    lse2 -= log2f(fabsf(gate));
    if (gate < 0.f) {
      delta = device::with_sign(delta, true);
      *negative = 1;  // whoever writes it, writes the same
    }
  }
  return {lse2, delta};
}

// 8 elements a lane: Dv / 8 lanes share a (row, head).
template <typename Element>
__global__ void __launch_bounds__(256) row_stats(const __grid_constant__ StatsInputs in, int total_q, int num_heads,
                                                 int lanes, RowStats* stats, int* negative) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t item = thread / lanes;
  const int lane = static_cast<int>(thread - item * lanes);
  float sum = 0;
  const bool real = item < static_cast<int64_t>(total_q) * num_heads;
  const int row = real ? static_cast<int>(item / num_heads) : 0;
  const int head = real ? static_cast<int>(item - static_cast<int64_t>(row) * num_heads) : 0;
  if (real) {
    const uint4 a = *reinterpret_cast<const uint4*>(in.o.at(row, head) + lane * 16);
    const uint4 b = *reinterpret_cast<const uint4*>(in.dout.at(row, head) + lane * 16);
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = Half<Element>::unpack(x[i]), g = Half<Element>::unpack(y[i]);
      sum += f.x * g.x + f.y * g.y;
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (real && lane == 0) stats[item] = stats_of(in, row, head, sum, negative);
}

// The same where delta is known.
__global__ void __launch_bounds__(256) row_stats_of_delta(const __grid_constant__ StatsInputs in, int total_q,
                                                          int num_heads, RowStats* stats, int* negative) {
  const int64_t item = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (item >= static_cast<int64_t>(total_q) * num_heads) return;
  const int row = static_cast<int>(item / num_heads), head = static_cast<int>(item % num_heads);
  stats[item] = stats_of(in, row, head, *reinterpret_cast<const float*>(in.delta.at(row, head)), negative);
}

// A head's gradients of a key, of 4 columns of [Dk + Dv].
template <typename Element>
__device__ __forceinline__ void store_gradient(const BackwardArgs& a, int k_row, int head, int dim, int dk,
                                               float4 sum) {
  const bool is_k = dim < dk;
  const TensorArg& out = is_k ? a.dk : a.dv;
  if (!out.data) return;
  const float scale = is_k ? a.scale : 1.f;
  *reinterpret_cast<uint2*>(out.at(k_row, head) + 2 * (is_k ? dim : dim - dk)) = {
      Half<Element>::pack(sum.x * scale, sum.y * scale), Half<Element>::pack(sum.z * scale, sum.w * scale)};
}

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// A CTA takes a part of the tiles of `step` items' lists. Often few of thousands of lists are split, and a CTA for each
// would take as long as the sums: 43 us instead of 10 (32K tokens, 16 kv heads). Lists in one piece have written or
// added dk and dv themselves.
template <typename Element>
__global__ void __launch_bounds__(256) sum_partials(BackwardArgs a, int step, int dk, int dv) {
  const int64_t first_item = static_cast<int64_t>(blockIdx.x) * step;
  const WorkItem* const items = a.index.items + a.index.window * a.index.max_items + first_item;
  const int lane = threadIdx.x % 32, dims = dk + dv;
  const int64_t tile = static_cast<int64_t>(a.plan.block_size) * dims;
  const bool split = lane < step && first_item + lane < a.index.max_items && items[lane].pieces > 1;
  for (unsigned left = __ballot_sync(kFullWarp, split); left; left &= left - 1) {
    const WorkItem item = items[__ffs(left) - 1];
    const float* first = a.partials + item.partial * tile;
    for (int i = 4 * (blockIdx.y * blockDim.x + threadIdx.x); i < item.keys * dims; i += 4 * gridDim.y * blockDim.x) {
      const int key = i / dims, dim = i - key * dims;
      float4 sum = {0, 0, 0, 0};
#pragma unroll 8  // or it would wait for one tile after the other
      for (int c = 0; c < item.pieces; ++c) sum = sum + *reinterpret_cast<const float4*>(first + c * tile + i);
      const int k_row = item.first_key + key;
      if (a.sums) {
        auto* const to =
            reinterpret_cast<float4*>(a.sums + (static_cast<int64_t>(k_row) * a.num_heads_k + item.head) * dims + dim);
        *to = *to + sum;
      } else {
        store_gradient<Element>(a, k_row, item.head, dim, dk, sum);
      }
    }
  }
}

// From the sums of all windows.
template <typename Element>
__global__ void __launch_bounds__(256) round_all_sums(BackwardArgs a, int dk, int dv) {
  const int dims = dk + dv;
  const int64_t count = static_cast<int64_t>(a.plan.total_k) * a.num_heads_k * dims;
  for (int64_t i = 4 * (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x); i < count;
       i += 4 * static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / dims;
    const int k_row = static_cast<int>(row / a.num_heads_k);
    const int head = static_cast<int>(row - static_cast<int64_t>(k_row) * a.num_heads_k);
    store_gradient<Element>(a, k_row, head, static_cast<int>(i - row * dims), dk,
                            *reinterpret_cast<const float4*>(a.sums + i));
  }
}

__global__ void __launch_bounds__(256)
    clear_rows(TensorArg out, const int32_t* key_begin, int batch, int total_k, int num_heads, int chunks) {
  const int begin = key_begin[0], end = key_begin[batch];
  const int64_t dead = static_cast<int64_t>(begin) + total_k - end;
  const int64_t count = dead * num_heads * chunks;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t item = i / chunks;
    const int nth = static_cast<int>(item / num_heads);
    const int row = nth < begin ? nth : nth - begin + end;
    char* at = out.at(row, static_cast<int>(item - static_cast<int64_t>(nth) * num_heads)) + 16 * (i - item * chunks);
    *reinterpret_cast<uint4*>(at) = {0, 0, 0, 0};
  }
}

}  // namespace

Status make_row_stats(Dtype dtype, const StatsInputs& in, int total_q, int num_heads, int dv, RowStats* stats,
                      int* negative, cudaStream_t stream) {
  constexpr const char* kWhat = "attention backward: delta";
  if (negative) {
    const Status status = cuda_status(cudaMemsetAsync(negative, 0, sizeof(int), stream), kWhat);
    if (!status.ok()) return status;
  }
  const int lanes = in.delta.data ? 1 : dv / 8;
  const int64_t threads = static_cast<int64_t>(total_q) * num_heads * lanes;
  const auto blocks = static_cast<unsigned>((threads + 255) / 256);
  if (in.delta.data) {
    row_stats_of_delta<<<blocks, 256, 0, stream>>>(in, total_q, num_heads, stats, negative);
  } else {
    auto* kernel = dtype == Dtype::kBFloat16 ? row_stats<__nv_bfloat16> : row_stats<__half>;
    kernel<<<blocks, 256, 0, stream>>>(in, total_q, num_heads, lanes, stats, negative);
  }
  return cuda_status(cudaGetLastError(), kWhat);
}

Status add_partials(Dtype dtype, const BackwardArgs& args, int dk, int dv, cudaStream_t stream) {
  if (args.index.max_partials == 0 || !(args.dk.data || args.dv.data)) return {};
  const int parts = args.plan.block_size < 64 ? 4 : 16;
  const int step = static_cast<int>(std::clamp<int64_t>(args.index.max_items / 512, 1, 32));
  auto* kernel = dtype == Dtype::kBFloat16 ? sum_partials<__nv_bfloat16> : sum_partials<__half>;
  const auto ctas = static_cast<unsigned>(divide_up(args.index.max_items, step));
  kernel<<<dim3(ctas, parts), 256, 0, stream>>>(args, step, dk, dv);
  return cuda_status(cudaGetLastError(), "selected attention backward: adding partial tiles");
}

Status clear_sums(const BackwardArgs& args, int dk, int dv, cudaStream_t stream) {
  const std::size_t floats = static_cast<std::size_t>(args.plan.total_k) * args.num_heads_k * (dk + dv);
  return cuda_status(cudaMemsetAsync(args.sums, 0, floats * sizeof(float), stream),
                     "selected attention backward: clearing the sums of all windows");
}

Status round_sums(Dtype dtype, const BackwardArgs& args, int dk, int dv, cudaStream_t stream) {
  auto* kernel = dtype == Dtype::kBFloat16 ? round_all_sums<__nv_bfloat16> : round_all_sums<__half>;
  kernel<<<8 * 132, 256, 0, stream>>>(args, dk, dv);  // all that an H100 holds at a time
  return cuda_status(cudaGetLastError(), "selected attention backward: rounding the sums of all windows");
}

Status clear_dead_keys(const SelectedAttentionProblem& p, const BackwardArgs& args, cudaStream_t stream) {
  if (!p.cu_seqlens_k || args.plan.total_k == 0) return {};
  for (const auto& [out, dim] : {std::pair{&args.dk, p.head_dim_qk}, std::pair{&args.dv, p.head_dim_v}}) {
    if (!out->data) continue;
    clear_rows<<<264, 256, 0, stream>>>(*out, args.plan.key_begin, static_cast<int>(p.batch), args.plan.total_k,
                                        args.num_heads_k, static_cast<int>(dim / 8));
  }
  return cuda_status(cudaGetLastError(), "selected attention backward: clearing keys outside the sequences");
}

}  // namespace nsa::cuda
