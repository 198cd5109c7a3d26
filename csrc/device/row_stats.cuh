// {lse2, delta} of a row, and the sign of its gate, which the backward's kernels carry in the lowest bit of delta:
// P becomes gate P by one exclusive or, done where scores are masked. Calls with a negative gate take that way
// everywhere, so that the usual one costs nothing: neither instructions nor a register.
#pragma once

#include "common/kernel_args.h"
#include "device/ptx.cuh"

namespace nsa::device {

// A row's {lse2, delta} into two arrays: P needs the first, dS the second, and a load of both wastes half.
__device__ __forceinline__ void copy_row_stats(uint32_t lse2, uint32_t delta, const cuda::RowStats* stats, bool real) {
  copy4_async(lse2, &stats->lse2, real);
  copy4_async(delta, &stats->delta, real);
}

__device__ __forceinline__ float with_sign(float delta, bool negative) {
  return __uint_as_float((__float_as_uint(delta) & ~1u) | (negative ? 1u : 0u));
}

__device__ __forceinline__ bool is_negative(float delta) { return __float_as_uint(delta) & 1; }
__device__ __forceinline__ bool is_negative(const float (&delta)[2]) {
  return (__float_as_uint(delta[0]) | __float_as_uint(delta[1])) & 1;
}

// x = |gate| P of a row, or what is proportional to it -> with the gate's sign.
__device__ __forceinline__ float signed_by(float delta, float x) {
  return __uint_as_float(__float_as_uint(x) ^ (__float_as_uint(delta) << 31));
}

}  // namespace nsa::device
