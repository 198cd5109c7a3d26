// The arguments of the attention kernels, in the form the device needs them.
#pragma once

#include <climits>

#include "common/plan.h"

namespace nsa::cuda {

// Elements of 16 bits, [rows of all sequences, heads, dim]; a row's offset needs its batch only where batches don't
// follow each other at a whole number of rows.
struct TensorArg {
  char* data;
  int64_t batch_bytes, row_bytes, head_bytes;
  int rows_per_batch;  // INT_MAX: rows follow each other through all batches

#ifdef __CUDACC__
  __device__ __forceinline__ int64_t row_offset(int row) const {
    if (row < rows_per_batch) return row * row_bytes;
    const int batch = row / rows_per_batch;
    return batch * batch_bytes + (row - batch * rows_per_batch) * row_bytes;
  }
  __device__ __forceinline__ int2 batch_and_row(int row) const {
    if (row < rows_per_batch) return {0, row};
    const int batch = row / rows_per_batch;
    return {batch, row - batch * rows_per_batch};
  }
  __device__ __forceinline__ char* at(int row, int head) const { return data + row_offset(row) + head * head_bytes; }
#endif
};

// packed: one batch. rows: of a batch.
TensorArg tensor_arg(const Tensor& tensor, bool packed, int64_t batch, int64_t rows, int element_bytes);
template <typename Problem>
TensorArg tensor_arg(const Tensor& tensor, const Problem& problem, int64_t rows, int element_bytes) {
  return tensor_arg(tensor, problem.cu_seqlens_q != nullptr, problem.batch, rows, element_bytes);
}

// Of a query row and head, for the backward. dQ reads both at once, dK and dV in two halves.
struct RowStats {
  // (lse - log |gate|) log2(e): exp2(s - lse2) is |gate| P. +inf on dead rows and where the gate is 0.
  float lse2;
  // sum(dout * o) - dlse. Its lowest bit: the gate is negative, and so is gate P (device/row_stats.cuh).
  float delta;
};

struct ForwardArgs {
  Plan plan;
  TileUnions unions;  // sm90
  TensorArg q, k, v, o;
  TensorArg lse;  // float; data null: not wanted
  int num_heads_k;
  Divisor group;     // G
  float scale_log2;  // softmax_scale * log2(e)
};

struct BackwardArgs {
  Plan plan;
  TileUnions unions;  // sm90
  InvertedIndex index;
  TensorArg q, k, v, dout;
  TensorArg dq, dk, dv;   // data null: not wanted
  const RowStats* stats;  // [total_q, Hq]
  const int* negative;    // whether the gate of any row is; null: no
  float* partials;        // [max_partials, l', Dk + Dv] of a window
  float* sums;            // [total_k, Hkv, Dk + Dv] of all windows; null where there is one
  // dS of a window, from dK's kernel to dQ's; null: not wanted. [l' / 64, ds_rows, 64 keys] in the dtype of q: a row
  // for every place (InvertedIndex) and head of the group. Of every 16 keys, 2 i, 2 i + 1, 2 i + 8, 2 i + 9 stand
  // together, as mma's A operand wants them.
  char* ds;
  int64_t ds_rows;
  int num_heads_k;
  Divisor group;
  float scale, scale_log2;
  bool accumulate_dq;
};

// Launches one compiled kernel; picks stages for the device's shared memory by itself.
struct Launch {
  int shared_memory;  // bytes a CTA may ask for
  int num_sms;
  cudaStream_t stream;
};
using ForwardKernel = Status (*)(const ForwardArgs&, const Launch&);
using BackwardKernel = Status (*)(const BackwardArgs&, const Launch&);
// What it takes at a time on such a device, with G heads to a group.
using TilesOfKernel = KernelTiles (*)(const Launch&, int group);

// common/backward_steps.cu
struct StatsInputs {
  TensorArg o, dout, lse;
  TensorArg dlse;   // data null: zero
  TensorArg delta;  // data null: found from o and dout, which aren't read else
  TensorArg gate;   // data null: 1
  Dtype gate_dtype;
};
// *negative becomes 1 where a gate is, else 0; null without gates.
Status make_row_stats(Dtype dtype, const StatsInputs& in, int total_q, int num_heads, int dv, RowStats* stats,
                      int* negative, cudaStream_t stream);
Status add_partials(Dtype dtype, const BackwardArgs& args, int dk, int dv, cudaStream_t stream);
// args.sums to zeros, and at the end dK and dV from them.
Status clear_sums(const BackwardArgs& args, int dk, int dv, cudaStream_t stream);
Status round_sums(Dtype dtype, const BackwardArgs& args, int dk, int dv, cudaStream_t stream);
Status clear_dead_keys(const SelectedAttentionProblem& problem, const BackwardArgs& args, cudaStream_t stream);

}  // namespace nsa::cuda
