// One gate in float, whatever its dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nsa_cuda/nsa.h"

namespace nsa::cuda {

__device__ __forceinline__ float load_gate(Dtype dtype, const char* from) {
  if (dtype == Dtype::kFloat32) return *reinterpret_cast<const float*>(from);
  if (dtype == Dtype::kBFloat16) return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(from));
  if (dtype == Dtype::kFloat16) return __half2float(*reinterpret_cast<const __half*>(from));
  return static_cast<float>(*reinterpret_cast<const double*>(from));
}

__device__ __forceinline__ void store_gate(Dtype dtype, char* to, float value) {
  if (dtype == Dtype::kFloat32) *reinterpret_cast<float*>(to) = value;
  if (dtype == Dtype::kBFloat16) *reinterpret_cast<__nv_bfloat16*>(to) = __float2bfloat16_rn(value);
  if (dtype == Dtype::kFloat16) *reinterpret_cast<__half*>(to) = __float2half_rn(value);
  if (dtype == Dtype::kFloat64) *reinterpret_cast<double*>(to) = value;
}

constexpr int bytes_of_gate(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace nsa::cuda
