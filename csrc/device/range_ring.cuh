// What the persistent Hopper kernels over tiles of query rows share (forward and dQ of range attention): how shared
// memory is divided, and the producer's walk.
#pragma once

#include "device/range_tma.cuh"

namespace nsa::device {

// kParts: pieces of a stage that have barriers of their own.
template <typename Config, int kParts>
struct RangeRing {
  uint32_t base;
  int stage = 0;
  unsigned phase = 0;

  __device__ __forceinline__ uint32_t full_q() const { return base; }
  __device__ __forceinline__ uint32_t empty_q() const { return base + 8; }
  __device__ __forceinline__ uint32_t full(int s, int part = 0) const { return base + 16 + 16 * (kParts * s + part); }
  __device__ __forceinline__ uint32_t empty(int s, int part = 0) const { return full(s, part) + 8; }
  // {tile's place, whether there is one} of every second tile
  __device__ __forceinline__ uint32_t info(int tile) const { return base + Config::kInfos + 64 * (tile & 1); }
  __device__ __forceinline__ uint32_t queries(int warpgroup) const {
    return base + Config::kQueries + warpgroup * Config::kRowBytes;
  }
  __device__ __forceinline__ uint32_t keys(int s) const { return base + Config::kStagesAt + s * Config::kStageBytes; }
  __device__ __forceinline__ uint32_t values(int s) const { return keys(s) + Config::kKeyBytes; }
  __device__ __forceinline__ void init() const {
    constexpr int kArrivals = Config::kConsumers / 32 * kWarpArrivals;
    barrier_init(full_q(), 1);
    barrier_init(empty_q(), kArrivals);
    for (int i = 0; i < Config::kStages * kParts; ++i) {
      barrier_init(full(0, i), 1);
      barrier_init(empty(0, i), kArrivals);
    }
    publish_barriers();
  }
  __device__ __forceinline__ void advance() {
    if (++stage == Config::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The producer thread's whole work: a CTA takes every gridDim.x-th tile. load_rows(w, token, head) loads the rows of
// warpgroup w, load_stage(key, head) waits for the ring's stage and loads it.
template <typename Config, typename Ring, typename LoadRows, typename LoadStage>
__device__ __forceinline__ void produce_range_tiles(const cuda::RangePlan& plan, const cuda::Divisor& num_heads_k,
                                                    const cuda::Divisor& group, Ring& ring, int tiles_per_head,
                                                    LoadRows load_rows, LoadStage load_stage) {
  int nth = 0;
  for (int t = blockIdx.x; t < tiles_per_head * num_heads_k; t += gridDim.x, ++nth) {
    const RangeQueries<Config::kRows> tile(plan, t, tiles_per_head, num_heads_k, group);
    const int stages = tile.num_stages(Config::kKeys);
    barrier_wait(ring.empty_q(), (nth & 1) ^ 1);
    tile.leave(ring.info(nth));
    store_shared(ring.info(nth) + 60, 1);
    barrier_arrive_expect(ring.full_q(), stages > 0 ? Config::kRows / 64 * Config::kRowBytes : 0);
    if (stages > 0) {
#pragma unroll Config::kRowUnroll
      for (int w = 0; w < Config::kRows / 64; ++w) {
        const auto row = tile.row(64 * w, group);
        load_rows(w, min(row.token, plan.total_q - 1), row.head);
      }
    }
    for (int i = 0; i < stages; ++i) {
      load_stage(tile.first + i * Config::kKeys, tile.head);
      ring.advance();
    }
  }
  barrier_wait(ring.empty_q(), (nth & 1) ^ 1);
  store_shared(ring.info(nth) + 60, 0);
  barrier_arrive(ring.full_q());
}

// By consumers: waits for the nth tile; false: there is none.
template <typename Ring>
__device__ __forceinline__ bool wait_for_tile(const Ring& ring, int nth) {
  barrier_wait(ring.full_q(), nth & 1);
  return __shfl_sync(kFullWarp, load_shared(ring.info(nth) + 60), 0) != 0;
}

}  // namespace nsa::device
