// What the backends of the operations share: the GPU, and the kernel that fits it.
#pragma once

#include "common/instances.h"

namespace nsa::cuda {

inline constexpr double kLog2e = 1.4426950408889634;

struct Gpu {
  Launch launch;
  int major, minor;
};

Status query_gpu(cudaStream_t stream, Gpu* gpu);

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

}  // namespace nsa::cuda
