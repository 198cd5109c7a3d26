// o and lse of range attention.
#pragma once

#include "device/range_tile.cuh"
#include "device/softmax.cuh"

namespace nsa::device {

// Writes one of a lane's two rows. A dead row (nothing seen) gets o = 0, lse = -inf; a NaN shows.
template <typename Element, int kDv>
__device__ __forceinline__ void store_output(const cuda::RangeForwardArgs& a, const OnlineSoftmax<kDv>& softmax, int r,
                                             bool real, int token, int head, int lane) {
  const float total = softmax.row_sum(r);
  char* to = real ? a.o.at(token, head) : nullptr;
  store_row_wide<Element, kDv>(to, real, softmax.o, r, total == 0.f ? 0.f : 1.f / total, lane);
  if (real && a.lse.data && (lane & 3) == 0) *reinterpret_cast<float*>(a.lse.at(token, head)) = softmax.lse(r, total);
}

}  // namespace nsa::device
