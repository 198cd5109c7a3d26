// The producer of the Hopper kernels over query tiles: one warp reads the union of a tile's lists (cuda::TileUnions)
// and loads each block by TMA into a ring of stages.
#pragma once

#include "common/tensor_map.h"
#include "device/tile_union.cuh"
#include "device/wgmma.cuh"

namespace nsa::device {

// Rows [0, valid) of a tensor into rows of a BoxTile, zeros into the others up to `rows`; the warp waits for them.
template <typename TileOfStage>
__device__ __forceinline__ void copy_partial(uint32_t tile, const char* source, int64_t row_bytes, int rows, int valid,
                                             int lane) {
  const char* from = source + 16 * (lane % 8);
#pragma unroll 1
  for (int row = lane / 8; row < rows; row += 4) {
#pragma unroll 1
    for (int c = 0; c < TileOfStage::kChunks / 8; ++c) {
      const bool real = row < valid;
      copy16_async(tile + TileOfStage::offset(row, lane % 8) + c * TileOfStage::kBoxBytes,
                   from + (real ? row * row_bytes + 128 * c : 0), real);
    }
  }
}

template <typename Shape>
struct TmaProducer {
  const cuda::TileUnions& unions;
  const cuda::TensorArg &k, &v;
  const cuda::KeyMaps& maps;
  int lane;

  // `part` keys from k row `key` on, `valid` of them real, into rows `row` .. of the stage.
  __device__ __forceinline__ void load(const KeyRing<Shape>& ring, int head, int key, int row, int part,
                                       int valid) const {
    const uint32_t keys = ring.keys() + row * 128, values = ring.values() + row * 128;
    if (valid == part) {
      if (lane != 0) return;
      barrier_expect(ring.full(), 2 * part * (Shape::kDk + Shape::kDv));
      const int2 k_place = k.batch_and_row(key), v_place = v.batch_and_row(key);
#pragma unroll 1
      for (int c = 0; c < Shape::kDk / 64; ++c)
        copy_box_async(keys + c * Shape::TileK::kBoxBytes, &maps.k, ring.full(), 64 * c, k_place.y, head, k_place.x);
#pragma unroll 1
      for (int c = 0; c < Shape::kDv / 64; ++c)
        copy_box_async(values + c * Shape::TileV::kBoxBytes, &maps.v, ring.full(), 64 * c, v_place.y, head, v_place.x);
      return;
    }
    // The end of a sequence: what lies behind it belongs to somebody else.
    copy_partial<typename Shape::TileK>(keys, k.at(key, head), k.row_bytes, part, valid, lane);
    copy_partial<typename Shape::TileV>(values, v.at(key, head), v.row_bytes, part, valid, lane);
    wait_copies();
    fence_shared_for_wgmma();
    __syncwarp();
  }

  __device__ __forceinline__ void tile_stages(KeyRing<Shape>& ring, int number) const {
    const int head = number / unions.tiles_per_head;
    const int parts = Shape::kKeys / unions.part;  // blocks a stage
    const int2 counts = __ldg(unions.counts + number);
    const int count = counts.x + counts.y;
    if (count == 0) {  // a tile without rows: consumers count tiles as the producer does
      barrier_wait(ring.empty(), ring.phase ^ 1);
      if (lane == 0)
        ring.publish(number, StageFlags::kLast);
      else
        arrive_in_step(ring.full(), lane);
      ring.advance();
      return;
    }
    const int32_t* entries = unions.entries + static_cast<int64_t>(number) * unions.capacity * unions.words + lane;
    // This lane's word of an entry; zeros behind the last one.
    const auto read = [&](int i) {
      const int place = i < counts.x ? i : unions.capacity - 1 - (i - counts.x);
      return i < count && lane < unions.words ? __ldg(entries + static_cast<int64_t>(place) * unions.words) : 0;
    };
    int ahead[2] = {read(0), read(1)};  // two entries: what the cache needs to answer
    for (int i = 0; i < count;) {
      unsigned any = 0, all = ~0u;
      for (int p = 0; p < parts; ++p, ++i) {
        const int word = ahead[0];
        ahead[0] = ahead[1];
        ahead[1] = read(i + 2);
        const int key = __shfl_sync(kFullWarp, word, 0), valid = __shfl_sync(kFullWarp, word, 1);
        const unsigned flags = __shfl_sync(kFullWarp, word, 2);
        any |= flags & StageFlags::kAny;
        all &= flags;
        if (p == 0) barrier_wait(ring.empty(), ring.phase ^ 1);
        load(ring, head, key, p * unions.part, unions.part, valid);
        const uint32_t info = ring.info() + 4 * Shape::kPartWords * p;
        if (lane == 0) store_shared(info, key);
        if (lane >= 3 && lane < unions.words) store_shared(info + 4 * (lane - 2), word);
      }
      __syncwarp();
      if (lane == 0) {
        ring.publish(number,
                     any | (all & (StageFlags::kAll | StageFlags::kAlone)) | (i >= count ? StageFlags::kLast : 0));
      } else {
        arrive_in_step(ring.full(), lane);
      }
      ring.advance();
    }
  }

  // A CTA takes every gridDim.x-th tile, one kv head after the other: its K and V stay in the L2.
  __device__ __forceinline__ void run(KeyRing<Shape>& ring, int tiles) const {
    if (lane == 0) {
      prefetch_map(&maps.k);
      prefetch_map(&maps.v);
    }
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) tile_stages(ring, t);
  }
};

}  // namespace nsa::device
