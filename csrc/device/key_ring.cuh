// The ring of the sm80 kernels over query tiles, and the producers that fill it by cp.async.
#pragma once

#include "device/block_walk.cuh"
#include "device/query_tile.cuh"

namespace nsa::device {

template <typename Shape>  // a QueryTileShape
struct KeyRingShape : Shape {
  // Shared memory: places, barriers, infos, stages, consumers' own. Only the last offset is unknown to the compiler.
  static constexpr int kMaxStages = 227 * 1024 / Shape::kStageBytes;
  static constexpr int kInfos = Shape::kBarriers + 16 * kMaxStages;
  static constexpr int kStages = (kInfos + 4 * Shape::kInfoWords * kMaxStages + 1023) / 1024 * 1024;
  static int num_stages(int shared_bytes, int warps) {
    return (shared_bytes - kStages - warps * Shape::kWarpBytes) / Shape::kStageBytes;
  }
  static int shared_bytes(int stages, int warps) {
    return kStages + stages * Shape::kStageBytes + warps * Shape::kWarpBytes;
  }

  // Consumer warps: as many as leave three stages, but never fewer than four. (One stage works, three hide the
  // latency.)
  static int choose_warps(int shared_bytes) {
    int warps = Shape::kMaxWarps;
    while (warps > 4 && num_stages(shared_bytes, warps) < 3) --warps;
    return warps;
  }
};

// Behind a stage's blocks stand the tile's number, and whether the stage is its last. So consumers keep no place in the
// tile loop: those registers decide whether the inner loop spills.
template <typename Shape>  // a KeyRingShape
struct KeyRing {
  uint32_t shared;
  int stages;
  int stage = 0;
  unsigned phase = 0;

  __device__ __forceinline__ KeyRing(const char* base, int num_stages)
      : shared(shared_address(base)), stages(num_stages) {}
  __device__ __forceinline__ uint32_t full(int s) const { return shared + Shape::kBarriers + 16 * s; }
  __device__ __forceinline__ uint32_t empty(int s) const { return full(s) + 8; }
  // Of the stage whose turn it is:
  __device__ __forceinline__ uint32_t full() const { return full(stage); }
  __device__ __forceinline__ uint32_t empty() const { return empty(stage); }
  __device__ __forceinline__ uint32_t info() const { return shared + Shape::kInfos + 4 * Shape::kInfoWords * stage; }
  __device__ __forceinline__ uint32_t keys() const { return shared + Shape::kStages + stage * Shape::kStageBytes; }
  __device__ __forceinline__ uint32_t values() const { return keys() + Shape::kKeyBytes; }
  __device__ __forceinline__ uint32_t tile_info() const { return info() + 4 * Shape::kParts * Shape::kPartWords; }
  __device__ __forceinline__ uint32_t flags() const { return tile_info() + 4; }

  __device__ __forceinline__ void init(int producer_arrivals, int consumer_warps) const {
    for (int s = 0; s < stages; ++s) {
      barrier_init(full(s), producer_arrivals);
      barrier_init(empty(s), consumer_warps * kWarpArrivals);
    }
    publish_barriers();
  }
  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  // By consumers: the tile that the next stage belongs to, -1 after the last one.
  __device__ __forceinline__ int wait_tile() const {
    barrier_wait(full(), phase);
    return load_shared(tile_info());
  }
  __device__ __forceinline__ bool is_last() const { return load_shared(flags()) != 0; }
  // By one thread of the producers, behind its copies.
  __device__ __forceinline__ void publish(int tile, unsigned flags_of_stage) const {
    store_shared(tile_info(), tile);
    store_shared(flags(), static_cast<int>(flags_of_stage));
    barrier_arrive(full());
  }
  // By a consumer warp, when it is done with the stage.
  __device__ __forceinline__ void release(int lane) {
    arrive_for_warp(empty(), lane);
    advance();
  }
  __device__ __forceinline__ uint32_t own(int warp) const {
    return shared + Shape::kStages + stages * Shape::kStageBytes + warp * Shape::kWarpBytes;
  }
};

// The block that a producer is giving to stages, part by part.
struct BlockParts {
  int2 place = {0, 0};  // first k row, keys
  int done = 0;         // keys already given
};

// A stage's i-th block (or part of one): the k row of its first key, and who chose it. By one warp.
template <typename Shape>
__device__ __forceinline__ void describe_part(const KeyRing<Shape>& ring, int i, int key, int words, unsigned members,
                                              int lane) {
  const uint32_t info = ring.info() + 4 * Shape::kPartWords * i;
  if (lane == 0) store_shared(info, key);
  if (lane < words) store_shared(info + 4 + 4 * lane, static_cast<int>(members));
}

// All producer warps walk the union for themselves (cheaper than telling each other) and copy a share of every stage.
template <typename Shape>
__device__ __forceinline__ void produce_key_stages(const cuda::Plan& plan, const cuda::TensorArg& k,
                                                   const cuda::TensorArg& v, int number, const QueryTile& tile,
                                                   int warps, const cuda::Divisor& group, KeyRing<Shape>& ring,
                                                   int warp, int lane) {
  constexpr int kThreads = 32 * Shape::kProducerWarps;
  const int thread = 32 * warp + lane;
  const int part = min(plan.block_size, Shape::kKeys);  // keys that a block gives to a stage
  const int parts = Shape::kKeys / part;                // blocks a stage
  const RowCopy<typename Shape::TileK, kThreads> copy_k(k.row_bytes, thread);
  const RowCopy<typename Shape::TileV, kThreads> copy_v(v.row_bytes, thread);
  const char* k_head = k.data + tile.head * k.head_bytes;
  const char* v_head = v.data + tile.head * v.head_bytes;
  const int2 tokens = tile.tokens(plan.units, warps, group);
  BlockWalk<Shape::kWords> walk;
  walk.start(plan.lists + (static_cast<int64_t>(tile.head) * plan.total_q + tokens.x) * plan.list_width,
             plan.list_width, tokens.y, lane);
  auto place_upcoming = [&] {
    return walk.upcoming() == cuda::kNoBlock ? int2{0, 0} : __ldg(plan.blocks + walk.upcoming());
  };
  int2 upcoming = place_upcoming();
  BlockParts block;
  block.done = plan.block_size;
  unsigned members = 0;
  bool last;
  do {
    barrier_wait(ring.empty(), ring.phase ^ 1);
    for (int i = 0; i < parts; ++i) {
      if (block.done >= plan.block_size) {
        members = walk.next(lane);
        block = {upcoming, 0};
        upcoming = place_upcoming();  // a stage ahead: its latency hides behind the copies
      }
      const int valid = min(max(block.place.y - block.done, 0), part);
      const int key = valid ? block.place.x + block.done : 0;
      const char* k_rows = k_head + k.row_offset(key);
      const char* v_rows = v_head + v.row_offset(key);
      if (valid == Shape::kKeys) {
        copy_k.template all<Shape::kKeys>(ring.keys(), k_rows, k.row_bytes);
        copy_v.template all<Shape::kKeys>(ring.values(), v_rows, v.row_bytes);
      } else {
        copy_k.some(ring.keys() + i * part * Shape::TileK::kRowBytes, k_rows, k.row_bytes, part, valid);
        copy_v.some(ring.values() + i * part * Shape::TileV::kRowBytes, v_rows, v.row_bytes, part, valid);
      }
      if (warp == 0) describe_part(ring, i, key, walk.words(), valid ? members : 0, lane);
      block.done += part;
    }
    last = walk.upcoming() == cuda::kNoBlock && block.done >= min(block.place.y, plan.block_size);
    barrier_arrive_after_copies(ring.full());
    __syncwarp();
    if (thread == 0) ring.publish(number, last);
    ring.advance();
  } while (!last);
}

// The producers' whole work: a CTA takes every gridDim.x-th tile.
template <typename Shape>
__device__ __forceinline__ void produce_tiles(const cuda::Plan& plan, const cuda::TensorArg& k,
                                              const cuda::TensorArg& v, int num_heads_k, const cuda::Divisor& group,
                                              int warps, const cuda::Divisor& tiles_per_head, KeyRing<Shape>& ring,
                                              int warp, int lane) {
  // one kv head after the other: its K and V stay in the L2
  for (int t = blockIdx.x; t < tiles_per_head * num_heads_k; t += gridDim.x) {
    produce_key_stages(plan, k, v, t, QueryTile(t, tiles_per_head, warps), warps, group, ring, warp, lane);
  }
  barrier_wait(ring.empty(), ring.phase ^ 1);
  barrier_arrive(ring.full());
  if (warp == 0 && lane == 0) ring.publish(-1, true);
}

}  // namespace nsa::device
