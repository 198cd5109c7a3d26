// Sums over the lanes of a warp.
#pragma once

#include "device/ptx.cuh"

namespace nsa::device {

// The sum of `value` over this lane and those below it.
__device__ __forceinline__ int sum_up_to_lane(int value, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

}  // namespace nsa::device
