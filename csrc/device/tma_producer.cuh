// The producer of the Hopper kernels over query tiles: one warp walks the union of a tile's lists and loads each block
// by TMA into a ring of stages; it tells the consumers, unit by unit, who has anything to do with a stage.
#pragma once

#include "common/tensor_map.h"
#include "device/query_tile.cuh"
#include "device/wgmma.cuh"

namespace nsa::device {

// The flags of a stage: one bit a unit. Without them each consumer warp spent 85 of 425 instructions a stage on finding
// out whether the stage concerned it.
struct StageFlags {
  static constexpr int kMaxUnits = 12;
  static constexpr unsigned kLast = 0x80000000u;  // the tile's last stage
  // Some token of the unit chose a block of the stage.
  static __device__ __forceinline__ unsigned any(int unit) { return 1u << unit; }
  // Every token of the unit chose every block of the stage and sees all of it: nothing is to be masked.
  static __device__ __forceinline__ unsigned all(int unit) { return 1u << (kMaxUnits + unit); }
};

// What lane u knows of unit u: its tokens as places in the tile, and the last key that all of them see.
struct UnitTokens {
  int first, count;
  int last_key;

  __device__ __forceinline__ UnitTokens(const cuda::Plan& plan, const QueryTile& tile, int tile_token, int warps,
                                        int group, int lane) {
    first = count = 0;
    last_key = INT_MAX;
    if (lane >= warps) return;
    const Unit unit(plan.units, tile.first_unit + lane, group);
    if (!unit.real) return;
    first = unit.first_token - tile_token;
    count = unit.last_token(group) - unit.first_token + 1;
    for (int i = 0; i < count; ++i) last_key = min(last_key, __ldg(plan.last_key + unit.first_token + i));
  }
  __device__ __forceinline__ unsigned everybody() const { return (1u << count) - 1; }
  // Those of the tile's members (BlockWalk) that are the unit's; a unit has at most 16 tokens.
  __device__ __forceinline__ unsigned of(unsigned members) const {
    const unsigned low = __shfl_sync(kFullWarp, members, first / 32);
    const unsigned high = __shfl_sync(kFullWarp, members, first / 32 + 1);
    return __funnelshift_r(low, high, first & 31) & everybody();
  }
};

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
  const cuda::Plan& plan;
  const cuda::TensorArg &k, &v;
  const cuda::KeyMaps& maps;
  int num_heads_k, group, warps, tiles_per_head, lane;

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
    const QueryTile tile(number, tiles_per_head, warps);
    const int part = min(plan.block_size, Shape::kKeys);  // keys that a block gives to a stage
    const int parts = Shape::kKeys / part;                // blocks a stage
    const int2 tokens = tile.tokens(plan.units, warps, group);
    BlockWalk<Shape::kWords> walk;
    walk.start(plan.lists + (static_cast<int64_t>(tile.head) * plan.total_q + tokens.x) * plan.list_width,
               plan.list_width, tokens.y, lane);
    const UnitTokens unit(plan, tile, tokens.x, warps, group, lane);
    auto place_upcoming = [&] {
      return walk.upcoming() == cuda::kNoBlock ? int2{0, 0} : __ldg(plan.blocks + walk.upcoming());
    };
    int2 upcoming = place_upcoming();
    BlockParts block;
    block.done = plan.block_size;
    unsigned members = 0;
    bool last;
    do {
      bool any = false, all = true;
      for (int i = 0; i < parts; ++i) {
        if (block.done >= plan.block_size) {
          members = walk.next(lane);
          block = {upcoming, 0};
          upcoming = place_upcoming();  // a stage ahead: its latency hides behind the ring
        }
        const int valid = min(max(block.place.y - block.done, 0), part);
        const int key = valid ? block.place.x + block.done : 0;
        const unsigned mine = unit.of(members);
        any |= valid > 0 && mine != 0;
        all &= mine == unit.everybody() && key + part - 1 <= unit.last_key && valid == part;
        if (i == 0) barrier_wait(ring.empty(), ring.phase ^ 1);
        load(ring, tile.head, key, i * part, part, valid);
        describe_part(ring, i, key, walk.words(), valid ? members : 0, lane);
        block.done += part;
      }
      last = walk.upcoming() == cuda::kNoBlock && block.done >= min(block.place.y, plan.block_size);
      const unsigned units_any = __ballot_sync(kFullWarp, any), units_all = __ballot_sync(kFullWarp, all);
      __syncwarp();
      if (lane == 0) {
        constexpr unsigned kUnits = (1u << StageFlags::kMaxUnits) - 1;
        ring.publish(number, (units_any & kUnits) | (units_all & kUnits) << StageFlags::kMaxUnits |
                                 (last ? StageFlags::kLast : 0));
      }
      ring.advance();
    } while (!last);
  }

  // A CTA takes every gridDim.x-th tile, one kv head after the other: its K and V stay in the L2.
  __device__ __forceinline__ void run(KeyRing<Shape>& ring) const {
    if (lane == 0) {
      prefetch_map(&maps.k);
      prefetch_map(&maps.v);
    }
    for (int t = blockIdx.x; t < tiles_per_head * num_heads_k; t += gridDim.x) tile_stages(ring, t);
    barrier_wait(ring.empty(), ring.phase ^ 1);
    if (lane == 0) ring.publish(-1, StageFlags::kLast);
  }
};

}  // namespace nsa::device
