// What the Hopper kernels of range attention share: boxes of keys and of query rows by TMA, and zeros behind a
// sequence's last key.
#pragma once

#include <cuda.h>

#include "device/range_tile.cuh"
#include "device/warpgroup.cuh"

namespace nsa::device {

// kRows rows of one head into a BoxTile<kDim, kRows>, by one thread.
template <int kDim, int kRows>
__device__ __forceinline__ void copy_keys(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                          const cuda::TensorArg& from, int row, int head) {
  const int2 place = from.batch_and_row(row);
#pragma unroll
  for (int c = 0; c < kDim / 64; ++c)
    copy_box_async(to + c * BoxTile<kDim, kRows>::kBoxBytes, map, barrier, 64 * c, place.y, head, place.x);
}

// Zeros into rows [valid, kRows) of a BoxTile that TMA filled with another sequence's rows, which may hold NaN. Every
// warpgroup that reads the tile does it for itself, then calls publish_zeros().
template <int kDim, int kRows>
__device__ __forceinline__ void clear_rows(uint32_t boxes, int valid, int thread) {
  using Boxes = BoxTile<kDim, kRows>;
  const float zeros[4] = {0.f, 0.f, 0.f, 0.f};
  for (int i = valid * Boxes::kChunks + thread; i < kRows * Boxes::kChunks; i += 128)
    store_shared_float4(boxes + Boxes::offset(i / Boxes::kChunks, i % Boxes::kChunks), zeros);
}
__device__ __forceinline__ void publish_zeros(int warpgroup) {
  fence_shared_for_wgmma();
  sync_warpgroup(warpgroup);
}

}  // namespace nsa::device
