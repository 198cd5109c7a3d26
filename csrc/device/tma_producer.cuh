// The producers of the Hopper kernels over query tiles: warps that read the union of a tile's lists (cuda::TileUnions)
// and load its blocks by TMA into a ring, one each in turn. One warp alone takes 800 to 1000 cycles a block, nearly all
// of it latency: with it the uniform forward took 13.6 ms at 64K tokens, with two or four 12.25.
#pragma once

#include "common/tensor_map.h"
#include "device/block_ring.cuh"
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

// `part` rows from k row `key` on, `valid` of them real, into a stage; by one warp. The bytes of TMA count towards
// `full`.
template <typename TileOfStage>
__device__ __forceinline__ void load_rows_async(uint32_t to, const cuda::TensorArg& from, const CUtensorMap* map,
                                                uint32_t full, int head, int key, int part, int valid, int lane) {
  if (valid == part) {
    if (lane != 0) return;
    barrier_expect(full, 16 * part * TileOfStage::kChunks);
    const int2 place = from.batch_and_row(key);
#pragma unroll 1
    for (int c = 0; c < TileOfStage::kChunks / 8; ++c)
      copy_box_async(to + c * TileOfStage::kBoxBytes, map, full, 64 * c, place.y, head, place.x);
    return;
  }
  // The end of a sequence: what lies behind it belongs to somebody else.
  copy_partial<TileOfStage>(to, from.at(key, head), from.row_bytes, part, valid, lane);
  wait_copies();
  fence_shared_for_wgmma();
  __syncwarp();
}

template <typename Shape>
struct TmaProducer {
  const cuda::TileUnions& unions;
  const cuda::TensorArg &k, &v;
  const CUtensorMap *k_map, *v_map;  // v's aren't used where the ring has no values
  int lane;

  // Every kProducers-th stage of a tile, from the turn-th on; returns by how much the last step went past them.
  __device__ __forceinline__ int tile_stages(BlockRing<Shape>& ring, int number, int turn) const {
    const int head = number / unions.tiles_per_head;
    const int parts = Shape::kKeys / unions.part;  // blocks a stage
    const int2 counts = __ldg(unions.counts + number);
    // One stage in any case: consumers count tiles as the producers do.
    const int count = counts.x + counts.y, stages = max((count + parts - 1) / parts, 1);
    const int32_t* entries = unions.entries + static_cast<int64_t>(number) * unions.capacity * unions.words + lane;
    // This lane's word of an entry; zeros behind the last one.
    const auto read = [&](int i) {
      const int place = i < counts.x ? i : unions.capacity - 1 - (i - counts.x);
      return i < count && lane < unions.words ? __ldg(entries + static_cast<int64_t>(place) * unions.words) : 0;
    };
    int stage = turn, ahead = read(stage * parts);
    for (; stage < stages; stage += Shape::kProducers) {
      const uint32_t full = ring.full(ring.key_stage), keys = ring.keys(ring.key_stage);
      const uint32_t values = ring.values(ring.value_stage), info = ring.info(ring.value_stage);
      unsigned any = 0, all = ~0u;
      for (int p = 0; p < parts; ++p) {
        const int word = ahead;
        ahead = read(p + 1 < parts ? stage * parts + p + 1 : (stage + Shape::kProducers) * parts);
        const int key = __shfl_sync(kFullWarp, word, 0), valid = __shfl_sync(kFullWarp, word, 1);
        const unsigned flags = __shfl_sync(kFullWarp, word, 2);
        any |= flags & StageFlags::kAny;
        all &= flags;
        const int row = p * unions.part;
        if (p == 0) ring.wait_for_keys();
        load_rows_async<typename Shape::TileK>(keys + row * 128, k, k_map, full, head, key, unions.part, valid, lane);
        if constexpr (Shape::kValues) {
          if (p == 0) ring.wait_for_values();
          load_rows_async<typename Shape::TileV>(values + row * 128, v, v_map, full, head, key, unions.part, valid,
                                                 lane);
        }
        const uint32_t part_info = info + 4 * Shape::kPartWords * p;
        if (lane == 0) store_shared(part_info, key);
        if (lane >= 3 && lane < unions.words) store_shared(part_info + 4 * (lane - 2), word);
      }
      const unsigned last = stage + 1 >= stages ? StageFlags::kLast : 0;
      ring.publish(any | (all & (StageFlags::kAll | StageFlags::kAlone)) | last, lane);
    }
    return stage - stages;
  }

  // By the first kProducers producer warps. A CTA takes every gridDim.x-th of `tiles`; number_of(t): the t-th's number
  // among the unions.
  template <typename NumberOf>
  __device__ __forceinline__ void run(BlockRing<Shape>& ring, int producer, int tiles, NumberOf number_of) const {
    if (lane == 0) {
      prefetch_map(k_map);
      if constexpr (Shape::kValues) prefetch_map(v_map);
    }
    ring.advance(producer);
    int turn = producer;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) turn = tile_stages(ring, number_of(t), turn);
  }
};

}  // namespace nsa::device
