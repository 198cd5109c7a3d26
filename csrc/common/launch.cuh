// What every kernel's launch needs.
#pragma once

#include <cuda_runtime.h>

#include "common/kernel_args.h"
#include "device/ptx.cuh"

namespace nsa::cuda {

// The dtype of an instance's name as a type.
using ElementOf_bfloat16 = __nv_bfloat16;
using ElementOf_float16 = __half;

template <typename Kernel, typename... Args>
Status launch_kernel(const char* what, Kernel* kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                     const Args&... args) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, stream>>>(args...);
    error = cudaGetLastError();
  }
  return cuda_status(error, what);
}

}  // namespace nsa::cuda
