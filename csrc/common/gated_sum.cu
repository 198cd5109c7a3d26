// o = sum over branches c of g_c o_c, and its gradients: bound by memory alone.
#include <cuda_runtime.h>

#include "common/cuda_backend.h"
#include "common/gates.cuh"
#include "common/plan.h"
#include "device/ptx.cuh"

namespace nsa::cuda {
namespace {

using device::Half;
using device::kFullWarp;

constexpr int kThreads = 256;

struct Rows {
  char* data;
  int64_t batch_bytes, row_bytes, head_bytes;
  __device__ __forceinline__ char* at(int batch, int row, int head) const {
    return data + batch * batch_bytes + row * row_bytes + head * head_bytes;
  }
};

struct Gates {
  char* data;
  int64_t batch_bytes, row_bytes, head_bytes, branch_bytes;
  Dtype dtype;
  __device__ __forceinline__ char* at(int batch, int row, int head, int branch) const {
    return data + batch * batch_bytes + row * row_bytes + head * head_bytes + branch * branch_bytes;
  }
};

struct GatedArgs {
  Rows o[3];            // of the branches; backward: data null: not wanted
  Rows sum;             // forward: o
  Rows dout;            // backward
  Gates gates;          // backward: dgates
  int rows, num_heads;  // of one batch
  int64_t items;        // batch * rows * num_heads
  int chunks;           // of 8 elements
  int lanes_log2;       // 2^ this lanes share an item, at most a warp
};

// Which (batch, row, head) a group of lanes works on.
struct Item {
  int batch, row, head, lane, lanes;
  bool real;
  __device__ __forceinline__ explicit Item(const GatedArgs& a) {
    const int64_t thread = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
    const int64_t item = thread >> a.lanes_log2;
    lanes = 1 << a.lanes_log2;
    lane = static_cast<int>(thread) & (lanes - 1);
    real = item < a.items;
    const int64_t row_of_all = real ? item / a.num_heads : 0;
    head = real ? static_cast<int>(item - row_of_all * a.num_heads) : 0;
    batch = static_cast<int>(row_of_all / a.rows);
    row = static_cast<int>(row_of_all - static_cast<int64_t>(batch) * a.rows);
  }
};

// Read once: past the L1, and first to leave the L2.
__device__ __forceinline__ uint4 load_once(const char* from) { return __ldcs(reinterpret_cast<const uint4*>(from)); }

template <typename Element>
__device__ __forceinline__ void unpack8(const uint4& from, float (&to)[8]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Half<Element>::unpack(words[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

template <typename Element>
__device__ __forceinline__ uint4 pack8(const float (&from)[8]) {
  return {Half<Element>::pack(from[0], from[1]), Half<Element>::pack(from[2], from[3]),
          Half<Element>::pack(from[4], from[5]), Half<Element>::pack(from[6], from[7])};
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) sum_forward(const __grid_constant__ GatedArgs a) {
  const Item item(a);
  if (!item.real) return;
  float gates[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) gates[c] = load_gate(a.gates.dtype, a.gates.at(item.batch, item.row, item.head, c));
  for (int chunk = item.lane; chunk < a.chunks; chunk += item.lanes) {
    uint4 packed[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) packed[c] = load_once(a.o[c].at(item.batch, item.row, item.head) + 16 * chunk);
    float sum[8] = {};
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      float x[8];
      unpack8<Element>(packed[c], x);
      // 0 where o_c is 0, whatever the gate of a dead row holds
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += x[i] == 0.f ? 0.f : gates[c] * x[i];
    }
    *reinterpret_cast<uint4*>(a.sum.at(item.batch, item.row, item.head) + 16 * chunk) = pack8<Element>(sum);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) sum_backward(const __grid_constant__ GatedArgs a) {
  const Item item(a);
  float sums[3] = {};
  if (item.real) {
    for (int chunk = item.lane; chunk < a.chunks; chunk += item.lanes) {
      const uint4 packed_dout = load_once(a.dout.at(item.batch, item.row, item.head) + 16 * chunk);
      uint4 packed[3];
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        packed[c] = {0, 0, 0, 0};
        if (a.o[c].data) packed[c] = load_once(a.o[c].at(item.batch, item.row, item.head) + 16 * chunk);
      }
      float dout[8], x[8];
      unpack8<Element>(packed_dout, dout);
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        unpack8<Element>(packed[c], x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[c] += x[i] == 0.f ? 0.f : x[i] * dout[i];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    for (int step = item.lanes / 2; step > 0; step /= 2) sums[c] += __shfl_xor_sync(kFullWarp, sums[c], step);
  }
  if (!item.real) return;
#pragma unroll
  for (int c = 0; c < 3; ++c) {  // each by a lane of its own
    if (item.lane == c && a.o[c].data)
      store_gate(a.gates.dtype, a.gates.at(item.batch, item.row, item.head, c), sums[c]);
  }
}

Rows rows_of(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data), 2 * tensor.batch_stride, 2 * tensor.row_stride, 2 * tensor.head_stride};
}

Gates gates_of(const GateTensor& gates) {
  const int64_t bytes = bytes_of_gate(gates.dtype);
  return {static_cast<char*>(gates.data), bytes * gates.batch_stride,  bytes * gates.row_stride,
          bytes * gates.head_stride,      bytes * gates.branch_stride, gates.dtype};
}

GatedArgs sizes_of(const GatedSumProblem& p) {
  GatedArgs a = {};
  a.rows = static_cast<int>(p.rows);
  a.num_heads = static_cast<int>(p.num_heads);
  a.items = p.batch * p.rows * p.num_heads;
  a.chunks = static_cast<int>(p.head_dim / 8);
  a.lanes_log2 = 2;  // three of them write the gates' gradients
  while (a.lanes_log2 < 5 && (1 << a.lanes_log2) < a.chunks) ++a.lanes_log2;
  return a;
}

template <typename Kernel>
Status launch(const char* what, Kernel of_bfloat16, Kernel of_float16, Dtype dtype, const GatedArgs& a,
              cudaStream_t stream) {
  const int64_t per_block = kThreads >> a.lanes_log2;
  const int64_t blocks = (a.items + per_block - 1) / per_block;
  if (blocks == 0) return {};
  if (blocks > INT_MAX) {
    return make_status(StatusCode::kNotSupported, "%s: %lld (row, head) pairs; CUDA kernels take up to %lld", what,
                       static_cast<long long>(a.items), static_cast<long long>(per_block) * INT_MAX);
  }
  const Kernel kernel = dtype == Dtype::kBFloat16 ? of_bfloat16 : of_float16;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
  return cuda_status(cudaGetLastError(), what);
}

}  // namespace

Status gated_sum(const GatedSumForward& args) {
  GatedArgs a = sizes_of(args.problem);
  a.o[0] = rows_of(args.o_cmp);
  a.o[1] = rows_of(args.o_slc);
  a.o[2] = rows_of(args.o_win);
  a.sum = rows_of(args.o);
  a.gates = gates_of(args.gates);
  return launch("gated sum", sum_forward<__nv_bfloat16>, sum_forward<__half>, args.problem.dtype, a, args.stream);
}

Status gated_sum(const GatedSumBackward& args) {
  GatedArgs a = sizes_of(args.problem);
  a.o[0] = rows_of(args.o_cmp);
  a.o[1] = rows_of(args.o_slc);
  a.o[2] = rows_of(args.o_win);
  a.dout = rows_of(args.dout);
  a.gates = gates_of(args.dgates);
  return launch("gated sum backward", sum_backward<__nv_bfloat16>, sum_backward<__half>, args.problem.dtype, a,
                args.stream);
}

}  // namespace nsa::cuda
