// Block selection (eqs. 8-12): scores of compressed keys by mma.sync, pooled to blocks as they come, and the best
// blocks of every token. A group of four warps owns whole tokens; all threads copy.
#pragma once

#include "sm80/select_blocks/config.h"

namespace nsa::sm80::select_blocks {

using cuda::SelectionArgs;
using device::SelectionRows;
using device::SelectionTile;
using device::TokenTable;

// A step is one stage of keys for 64 rows of every group. G > 64: all 64-row parts of the group, one after the other.
template <typename Config>
struct Steps {
  bool by_class;     // 128 keys in order of their class (block_pool.cuh) are kParts stages
  int parts, heads;  // 64-row parts of a group of heads
  int number;

  __device__ __forceinline__ Steps(const SelectionArgs& a, const SelectionTile& tile) {
    by_class = cuda::pools_by_class(a);
    parts = by_class ? 128 / Config::kKeys : 1;
    heads = (a.group + cuda::kSelectionRows - 1) / cuda::kSelectionRows;
    const int keys = tile.scan_end(a) * a.keys_per_block, per_step = by_class ? 128 : Config::kKeys;
    number = (keys + per_step - 1) / per_step * parts * heads;
  }
  __device__ __forceinline__ int part(int step) const { return step % parts; }
  __device__ __forceinline__ int head(int step) const { return step / parts % heads; }
  // The first key of the step's 128 or kKeys.
  __device__ __forceinline__ int first_key(int step) const {
    return step / (parts * heads) * (by_class ? 128 : Config::kKeys);
  }
};

// kRows rows of a Tile<kDk>, eight threads a row; row(i): its address, or null for zeros.
template <typename Config, int kRows, int kThreads, typename Row>
__device__ __forceinline__ void copy_rows(uint32_t to, int thread, const char* anything, Row row) {
  using Tile = device::Tile<Config::kDk>;
  for (int i = thread / 8; i < kRows; i += kThreads / 8) {
    const char* from = row(i);
#pragma unroll
    for (int c = 0; c < Config::kDk / 64; ++c) {
      const int chunk = 8 * c + thread % 8;
      device::copy16_async(to + Tile::offset(i, chunk), from ? from + 16 * chunk : anything, from != nullptr);
    }
  }
}

template <typename Config>
__device__ __forceinline__ void copy_keys(const SelectionArgs& a, const SelectionTile& tile, const Steps<Config>& steps,
                                          int step, uint32_t stage) {
  const int first = steps.first_key(step), part = steps.part(step);
  const char* keys = a.k.data + tile.head * a.k.head_bytes + a.k.row_offset(tile.first_key);
  copy_rows<Config, Config::kKeys, Config::kThreads>(stage, threadIdx.x, a.q.data, [&](int i) {
    const int place = part * Config::kKeys + i;
    const int key = first + (steps.by_class ? 4 * (place % 32) + place / 32 : place);
    return key < tile.num_keys ? keys + key * a.k.row_bytes : nullptr;
  });
}

// Q of a group's tokens; rows that don't exist become zeros.
template <typename Config>
__device__ __forceinline__ void copy_queries(const SelectionArgs& a, const SelectionTile& tile, int group_token,
                                             int tokens, int first_head, uint32_t to) {
  copy_rows<Config, cuda::kSelectionRows, 128>(to, threadIdx.x % 128, a.q.data, [&](int i) -> const char* {
    const int token = i / a.group, head = first_head + i - token * a.group;
    if (token >= tokens || head >= a.group) return nullptr;
    return a.q.at(tile.first_token + group_token + token, tile.head * a.group + head);
  });
}

template <typename Config>
struct Group {
  uint32_t query;
  float* table;
  TokenTable tokens;
  int token, number;  // first token in the tile, tokens
  int seen_by_all;    // keys that every token sees
  SelectionRows rows;
  int first_head = -1;               // whose Q is there
  float masses[Config::kKeys / 32];  // G > 64: of the group's one token, over the heads so far
};

// 32 keys in their order, all heads of the group that are in Q; last_heads: none are missing.
template <typename Config>
__device__ __forceinline__ void take_keys(const SelectionArgs& a, Group<Config>& group, const float (&p)[4][4],
                                          int first, int nth, bool last_heads, int warp, int lane) {
  const float low[8] = {p[0][0], p[0][1], p[1][0], p[1][1], p[2][0], p[2][1], p[3][0], p[3][1]};
  const float high[8] = {p[0][2], p[0][3], p[1][2], p[1][3], p[2][2], p[2][3], p[3][2], p[3][3]};
  device::store_fragment(group.table, low, high, warp, lane);
  device::sync_warpgroup(warp / 4);
  const int rows = min(a.group - group.first_head, cuda::kSelectionRows);
  for (int token = warp % 4; token < group.number; token += 4) {
    float mass = device::sum_rows(group.table, token * a.group, rows, lane);
    if (a.group > cuda::kSelectionRows) {
#pragma unroll
      for (int i = 0; i < Config::kKeys / 32; ++i) {
        if (i == nth) mass = group.masses[i] = group.first_head > 0 ? group.masses[i] + mass : mass;
      }
    }
    if (last_heads) device::take_masses(a, group.tokens, token, mass, first, lane);
  }
  device::sync_warpgroup(warp / 4);
}

template <typename Config, bool kWhole>
__device__ __forceinline__ void take_class(const SelectionArgs& a, Group<Config>& group,
                                           device::BlockPool<kWhole>& pool, const float (&p)[4][4], int key_class,
                                           int first, int warp, int lane) {
  if (key_class == 0) {
    pool.template add<0>(p, lane);
  } else if (key_class < 3) {
    pool.template add<1>(p, lane);
  } else {
    pool.template add<3>(p, lane);
    device::take_pooled(a, group.tokens, group.table, pool, group.number, first / 4, warp, lane);
  }
}

// One step: scores, probabilities, pooling.
template <typename Config, bool kWhole>
__device__ __forceinline__ void take_step(const SelectionArgs& a, const Steps<Config>& steps, int step, uint32_t stage,
                                          Group<Config>& group, device::BlockPool<kWhole>& pool, int warp, int lane) {
  constexpr int kKeys = Config::kKeys;
  float s[kKeys / 8][4];
  device::clear(s);
  const device::SharedOperand<Config::kDk> q(group.query + 16 * (warp % 4) * device::Tile<Config::kDk>::kRowBytes,
                                             lane);
  device::multiply_transposed<typename Config::Element, Config::kDk, kKeys>(s, q, stage, lane);
  const int first = steps.first_key(step);
#pragma unroll
  for (int i = 0; i < kKeys / 32; ++i) {
    float (&p)[4][4] = *reinterpret_cast<float (*)[4][4]>(&s[4 * i]);
    if (steps.by_class) {
      const int key_class = steps.part(step) * (kKeys / 32) + i;
      device::probabilities<4>(p, group.rows, a.scale_log2, first + key_class, first + 128 > group.seen_by_all, lane);
      take_class<Config, kWhole>(a, group, pool, p, key_class, first, warp, lane);
    } else if constexpr (!kWhole) {
      device::probabilities<1>(p, group.rows, a.scale_log2, first + 32 * i, first + 32 * i + 32 > group.seen_by_all,
                               lane);
      take_keys<Config>(a, group, p, first + 32 * i, i, steps.head(step) == steps.heads - 1, warp, lane);
    }
  }
}

// All steps of a tile: keys go through a ring of stages, Q changes where the group's heads do.
template <typename Config, bool kWhole>
__device__ __forceinline__ void scan(const SelectionArgs& a, const SelectionTile& tile, const Steps<Config>& steps,
                                     uint32_t ring, int stages, Group<Config>& group, int warp, int lane) {
  device::BlockPool<kWhole> pool;
  pool.reset();
  // One copy group a step, so that all but the last stages - 2 groups hold what the step needs.
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps.number) copy_keys<Config>(a, tile, steps, step, ring + step * Config::kStageBytes);
    device::commit_copies();
  }
  int stage = 0;
  for (int step = 0; step < steps.number; ++step) {
    const int first_head = steps.head(step) * cuda::kSelectionRows;
    if (first_head != group.first_head) {
      __syncthreads();  // nobody reads the last heads' Q
      group.first_head = first_head;
      copy_queries<Config>(a, tile, group.token, group.number, first_head, group.query);
      group.rows.load(a, tile, group.token, group.number, first_head, warp, lane);
      device::wait_copies();
    }
    if (stages == 1) {
      __syncthreads();
      copy_keys<Config>(a, tile, steps, step, ring);
      device::wait_copies();
    } else if (stages == 4) {
      device::wait_copies_but<2>();
    } else if (stages == 3) {
      device::wait_copies_but<1>();
    } else {
      device::wait_copies();
    }
    __syncthreads();  // the stage has landed, and everyone is done with the one before, which is loaded next
    if (stages > 1) {
      const int ahead = step + stages - 1, to = stage == 0 ? stages - 1 : stage - 1;
      if (ahead < steps.number) copy_keys<Config>(a, tile, steps, ahead, ring + to * Config::kStageBytes);
      device::commit_copies();
    }
    take_step<Config, kWhole>(a, steps, step, ring + stage * Config::kStageBytes, group, pool, warp, lane);
    if (++stage == stages) stage = 0;
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    kernel(const __grid_constant__ SelectionArgs a, int list_bytes, int stages) {
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, nth = warp / 4;
  const uint32_t base = device::shared_address(shared);
  Group<Config> group;
  group.query = base + Config::queries_at(list_bytes) + nth * Config::kQueryBytes;
  group.table = reinterpret_cast<float*>(shared + Config::tables_at(list_bytes) + nth * device::kPoolBytes);
  group.tokens.place(a, base + nth * device::kStateBytes, shared + Config::kListsAt + nth * list_bytes, Config::kGroups,
                     nth, warp);
  const uint32_t ring = base + Config::stages_at(list_bytes);
  group.token = nth * a.tokens_per_group;
  for (int t = blockIdx.x; t < a.plan.max_tiles * a.num_heads_k; t += gridDim.x) {
    const SelectionTile tile(a, t);
    if (!tile.real) continue;
    __syncthreads();  // the last tile's stages, Q and states are free
    group.number = min(max(tile.tokens - group.token, 0), a.tokens_per_group);
    group.seen_by_all = tile.keys_of(a, group.token);
    group.first_head = -1;
    for (int token = threadIdx.x % 128; token < group.number; token += 128)
      group.tokens.set(token, tile.state_of(a, group.token + token));
    device::sync_warpgroup(nth);
    const Steps<Config> steps(a, tile);
    if (steps.by_class && a.group % 16 == 0)
      scan<Config, true>(a, tile, steps, ring, stages, group, warp, lane);
    else
      scan<Config, false>(a, tile, steps, ring, stages, group, warp, lane);
    for (int token = warp % 4; token < group.number; token += 4)
      device::write_blocks(a, group.tokens, token, tile.first_token + group.token + token, tile.head, lane);
  }
}

}  // namespace nsa::sm80::select_blocks
