// Block selection (eqs. 8-12) on Hopper for l' = 4 d, l = 2 d: keys and queries by TMA, scores by wgmma, pooled to
// blocks in registers.
#pragma once

#include <cuda.h>

#include "device/warpgroup.cuh"
#include "sm90/select_blocks/config.h"

namespace nsa::sm90::select_blocks {

using cuda::SelectionArgs;
using device::BoxTile;
using device::SelectionRows;
using device::SelectionTile;
using device::TokenTable;

struct Maps {
  CUtensorMap q, k;
};

template <typename Config>
struct Shared {
  uint32_t base;
  const Layout& layout;
  int stage = 0, buffer = 0;
  unsigned phase = 0, query_phase = 0;

  __device__ __forceinline__ uint32_t full_q() const { return base + 16 * buffer; }
  __device__ __forceinline__ uint32_t empty_q() const { return full_q() + 8; }
  __device__ __forceinline__ uint32_t full() const { return base + 32 + 16 * stage; }
  __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
  __device__ __forceinline__ uint32_t query(int group) const {
    return base + layout.queries + (buffer * Config::kGroups + group) * Config::kQueryBytes;
  }
  __device__ __forceinline__ uint32_t keys() const { return base + layout.stages_at + stage * Config::kStageBytes; }
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < 2 + layout.stages; ++i) {
      device::barrier_init(base + 16 * i, 1);
      device::barrier_init(base + 16 * i + 8, 4 * Config::kGroups * device::kWarpArrivals);
    }
    device::publish_barriers();
  }
  __device__ __forceinline__ void advance() {
    if (++stage == layout.stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void advance_query() {
    if (++buffer == layout.query_buffers) {
      buffer = 0;
      query_phase ^= 1;
    }
  }
};

__device__ __forceinline__ int num_stages(const SelectionArgs& a, const SelectionTile& tile) {
  return (tile.scan_end(a) + 31) / 32;
}

// The producer thread's whole work: a CTA takes every gridDim.x-th tile.
template <typename Config>
__device__ __forceinline__ void produce(const SelectionArgs& a, const Maps& maps, Shared<Config>& shared) {
  constexpr int kBoxes = Config::kDk / 64;
  for (int t = blockIdx.x; t < a.plan.max_tiles * a.num_heads_k; t += gridDim.x) {
    const SelectionTile tile(a, t);
    const int stages = num_stages(a, tile);
    if (stages == 0) continue;
    device::barrier_wait(shared.empty_q(), shared.query_phase ^ 1);
    device::barrier_arrive_expect(shared.full_q(), Config::kGroups * kBoxes * 128 * a.group * a.tokens_per_group);
    const int last = a.plan.total_q - 1;
    for (int g = 0; g < Config::kGroups; ++g) {
      // a group without tokens reads other rows, which nobody looks at
      const int2 place = a.q.batch_and_row(min(tile.first_token + g * a.tokens_per_group, last));
#pragma unroll
      for (int c = 0; c < kBoxes; ++c) {
        device::copy_box_async(shared.query(g) + c * BoxTile<Config::kDk, 64>::kBoxBytes, &maps.q, shared.full_q(),
                               64 * c, tile.head * a.group, place.y, place.x);
      }
    }
    shared.advance_query();
    const int2 place = a.k.batch_and_row(tile.first_key);
    for (int i = 0; i < stages; ++i) {
      device::barrier_wait(shared.empty(), shared.phase ^ 1);
      device::barrier_arrive_expect(shared.full(), Config::kStageBytes);
#pragma unroll
      for (int c = 0; c < kBoxes; ++c) {
#pragma unroll
        for (int key_class = 0; key_class < 4; ++key_class) {
          device::copy_box_async(shared.keys() + c * BoxTile<Config::kDk, 128>::kBoxBytes + key_class * 32 * 128,
                                 &maps.k, shared.full(), 64 * c, place.y + 128 * i + key_class, tile.head, place.x);
        }
      }
      shared.advance();
    }
  }
}

// Scores of 64 rows and a stage.
template <typename Config>
__device__ __forceinline__ void start_scores(float (&s)[16][4], uint32_t query, uint32_t keys) {
  const uint64_t from_a = device::matrix_descriptor(query), from_b = device::matrix_descriptor(keys);
  device::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kDk / 16; ++step) {
    device::Wgmma<typename Config::Element, 128>::rows(
        s, device::advance(from_a, step / 4 * BoxTile<Config::kDk, 64>::kBoxBytes + step % 4 * 32),
        device::advance(from_b, step / 4 * BoxTile<Config::kDk, 128>::kBoxBytes + step % 4 * 32), step > 0);
  }
  device::wgmma_commit();
}

template <typename Config, bool kWhole>
struct Group {
  SelectionRows rows;
  device::BlockPool<kWhole> pool;
  TokenTable tokens;
  float* table;
  int number;       // tokens
  int seen_by_all;  // keys that every token sees
};

// A stage's keys of one class; first: the stage's first key.
template <int kClass, typename Config, bool kWhole>
__device__ __forceinline__ void pool_class(const SelectionArgs& a, Group<Config, kWhole>& group, float (&s)[16][4],
                                           int first, bool masked, int lane) {
  float (&scores)[4][4] = *reinterpret_cast<float (*)[4][4]>(&s[4 * kClass]);
  device::probabilities<4>(scores, group.rows, a.scale_log2, first + kClass, masked, lane);
  group.pool.template add<kClass>(scores, lane);
}

template <typename Config, bool kWhole>
__device__ __forceinline__ void scan(const SelectionArgs& a, Shared<Config>& shared, uint32_t query,
                                     Group<Config, kWhole>& group, int stages, int warp, int lane) {
  float s[16][4];
  for (int i = 0; i < stages; ++i) {
    device::barrier_wait(shared.full(), shared.phase);
    start_scores<Config>(s, query, shared.keys());
    device::wgmma_wait<0>();
    device::hold(s);
    device::arrive_in_step(shared.empty(), lane);
    shared.advance();
    const bool masked = 128 * (i + 1) > group.seen_by_all;
    pool_class<0>(a, group, s, 128 * i, masked, lane);
    pool_class<1>(a, group, s, 128 * i, masked, lane);
    pool_class<2>(a, group, s, 128 * i, masked, lane);
    pool_class<3>(a, group, s, 128 * i, masked, lane);
    device::take_pooled(a, group.tokens, group.table, group.pool, group.number, 32 * i, warp, lane);
  }
  device::arrive_in_step(shared.empty_q(), lane);
}

template <typename Config, bool kWhole>
__device__ __forceinline__ void consume(const SelectionArgs& a, Shared<Config>& shared, char* memory, int warp,
                                        int lane) {
  const Layout& layout = shared.layout;
  const int nth = warp / 4, group_token = nth * a.tokens_per_group;
  Group<Config, kWhole> group;
  group.tokens.place(a, shared.base + Config::kStatesAt + nth * device::kStateBytes,
                     memory + Config::kListsAt + nth * layout.list_bytes, Config::kGroups, nth, warp);
  group.table = reinterpret_cast<float*>(memory + layout.tables + nth * device::kPoolBytes);
  for (int t = blockIdx.x; t < a.plan.max_tiles * a.num_heads_k; t += gridDim.x) {
    const SelectionTile tile(a, t);
    if (!tile.real) continue;
    group.number = min(max(tile.tokens - group_token, 0), a.tokens_per_group);
    device::sync_warpgroup(nth);  // the last tile's states are free
    for (int token = threadIdx.x % 128; token < group.number; token += 128)
      group.tokens.set(token, tile.state_of(a, group_token + token));
    device::sync_warpgroup(nth);
    const int stages = __shfl_sync(device::kFullWarp, num_stages(a, tile), 0);
    if (stages > 0) {
      group.rows.load(a, tile, group_token, group.number, 0, warp, lane);
      group.seen_by_all = __shfl_sync(device::kFullWarp, tile.keys_of(a, group_token), 0);
      group.pool.reset();
      device::barrier_wait(shared.full_q(), shared.query_phase);
      scan<Config, kWhole>(a, shared, shared.query(nth), group, stages, warp, lane);
      shared.advance_query();
    }
    for (int token = warp % 4; token < group.number; token += 4)
      device::write_blocks(a, group.tokens, token, tile.first_token + group_token + token, tile.head, lane);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ SelectionArgs a, const __grid_constant__ Maps maps,
           const __grid_constant__ Layout layout) {
  extern __shared__ __align__(1024) char memory[];
  const int warp = __shfl_sync(device::kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Shared<Config> shared{device::shared_address(memory), layout};
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  if (warp >= 4 * Config::kGroups) {
    device::give_registers<Config::kProducerRegisters>();
    if (warp == 4 * Config::kGroups && lane == 0) produce(a, maps, shared);
  } else {
    device::take_registers<Config::kConsumerRegisters>();
    if (a.group % 16 == 0)
      consume<Config, true>(a, shared, memory, warp, lane);
    else
      consume<Config, false>(a, shared, memory, warp, lane);
  }
}

}  // namespace nsa::sm90::select_blocks
