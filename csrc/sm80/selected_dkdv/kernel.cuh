// dK and dV of selected attention: a CTA owns keys of one block and gathers the query rows that chose it (inverted index).
//   S^T = K Q^T   P^T = exp(S^T - lse)   dV = P^T dO   dP^T = V dO^T   dS^T = P^T (dP^T - delta)   dK = scale dS^T Q
// Sums stay in registers and are added in a fixed order: bitwise deterministic without atomics.
#pragma once

#include "common/kernel_args.h"
#include "sm80/selected_dkdv/config.h"

namespace nsa::sm80::selected_dkdv {

using cuda::BackwardArgs;
using device::kFullWarp;

// One CTA's part of the work: entries [begin, end) of a block's list.
struct Item {
  int head;              // kv head
  int first_key, keys;   // k row; at most 64
  int first_in_block;    // key of the block, 0 or 64
  int64_t begin;         // entries, of index.rows
  int entries;
  int partial;           // partial tile, -1: the list is in one piece
};

// Which list holds work item `item`: a search with 32 probes a round, the same in every warp. -1: there is no such item.
__device__ __forceinline__ int find_list(const cuda::InvertedIndex& index, unsigned item, int lane) {
  int low = 0, high = index.num_lists;  // the last list with work_begin <= item, in [low, high)
  if (item >= static_cast<uint32_t>(index.work_begin[high])) return -1;
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int probe = low + lane * step;
    const bool before = probe < high && static_cast<uint32_t>(index.work_begin[probe]) <= item;
    const int last = 31 - __clz(__ballot_sync(kFullWarp, before));
    low += last * step;
    high = min(low + step, high);
  }
  return low;
}

template <typename Config>
__device__ __forceinline__ bool find_item(const BackwardArgs& a, int lane, Item& item) {
  const int list = find_list(a.index, blockIdx.x, lane);
  if (list < 0) return false;
  const uint64_t work = a.index.work_begin[list];
  const int nth = static_cast<int>(blockIdx.x - static_cast<uint32_t>(work));
  const bool split = static_cast<uint32_t>(a.index.work_begin[list + 1]) - static_cast<uint32_t>(work) > 1;
  item.head = list / a.plan.num_blocks;
  const int2 block = a.plan.blocks[list - item.head * a.plan.num_blocks];
  item.first_in_block = blockIdx.y * Config::kKeys;
  item.first_key = block.x + item.first_in_block;
  item.keys = min(block.y - item.first_in_block, Config::kKeys);
  item.begin = a.index.list_begin[list] + static_cast<int64_t>(nth) * a.index.chunk;
  item.entries = static_cast<int>(min(a.index.list_begin[list + 1] - item.begin, static_cast<int64_t>(a.index.chunk)));
  item.partial = split ? static_cast<int>(work >> 32) + nth : -1;
  return item.keys > 0;
}

// Brings query rows into stages. Four threads copy a row of 64 (eight one of 32); the row's token is read one stage ahead.
template <typename Config>
struct Gather {
  static constexpr int kThreadsPerRow = Config::kThreads / Config::kRows;
  const int32_t* tokens;
  int rows;     // entries * G
  int next;     // row that this thread copies next
  int token;
  bool real;

  __device__ __forceinline__ Gather(const BackwardArgs& a, const Item& item)
      : tokens(a.index.rows + item.begin), rows(item.entries * a.group), next(threadIdx.x / kThreadsPerRow) {
    read(a.group);
  }
  __device__ __forceinline__ void read(int group) {
    real = next < rows;
    token = real ? __ldg(tokens + next / group) : 0;
  }
  __device__ __forceinline__ void copy(const BackwardArgs& a, int kv_head, uint32_t stage, uint32_t full) {
    const int head = kv_head * a.group + next % a.group;
    const int row = threadIdx.x / kThreadsPerRow, part = threadIdx.x % kThreadsPerRow;
    const char* q = a.q.at(token, head);
    const char* dout = a.dout.at(token, head);
#pragma unroll
    for (int c = 0; c < device::Tile<Config::kDk>::kChunks / kThreadsPerRow; ++c) {
      const int chunk = c * kThreadsPerRow + part;
      device::copy16_async(stage + device::Tile<Config::kDk>::offset(row, chunk), q + 16 * chunk, real);
    }
#pragma unroll
    for (int c = 0; c < device::Tile<Config::kDv>::kChunks / kThreadsPerRow; ++c) {
      const int chunk = c * kThreadsPerRow + part;
      device::copy16_async(stage + Config::kDout + device::Tile<Config::kDv>::offset(row, chunk), dout + 16 * chunk, real);
    }
    if (part == 0) {  // rows that don't exist become zeros everywhere, and so does what they add
      const int heads = a.num_heads_k * a.group;
      device::copy_small_async<8>(stage + Config::kStats + 8 * row, a.stats + static_cast<int64_t>(token) * heads + head, real);
      device::copy_small_async<4>(stage + Config::kLastKeys + 4 * row, a.plan.last_key + token, real);
    }
    device::barrier_arrive_after_copies(full);
    next += Config::kRows;
    read(a.group);
  }
};

template <typename Config>
struct Sums {
  float dk[Config::kDkColumns / 8][4];
  float dv[Config::kDvColumns / 8][4];
};

// Which keys, columns and slices are a warp's.
struct WarpPlace {
  int key_tile, half, slice, num_slices;
};

// kSlice query rows against the warp's 16 keys.
template <typename Config>
__device__ __forceinline__ void attend(const BackwardArgs& a, uint32_t block, uint32_t stage, int first_row, const WarpPlace& place,
                                       int first_key, bool masked, int lane, Sums<Config>& sums) {
  using Element = typename Config::Element;
  using TileK = device::Tile<Config::kDk>;
  using TileV = device::Tile<Config::kDv>;
  constexpr int kSlice = Config::kSlice;
  const uint32_t q = stage + first_row * TileK::kRowBytes;
  const uint32_t dout = stage + Config::kDout + first_row * TileV::kRowBytes;
  float p[kSlice / 8][4], ds[kSlice / 8][4];
  device::clear(p);
  device::clear(ds);
  device::multiply_transposed<Element, Config::kDk, kSlice>(
      p, device::SharedOperand<Config::kDk>(block + place.key_tile * 16 * TileK::kRowBytes, lane), q, lane);
  device::multiply_transposed<Element, Config::kDv, kSlice>(
      ds, device::SharedOperand<Config::kDv>(block + Config::kKeyBytes + place.key_tile * 16 * TileV::kRowBytes, lane), dout, lane);
#pragma unroll
  for (int n = 0; n < kSlice / 8; ++n) {
    const int row = first_row + 8 * n + 2 * (lane & 3);
    const float4 stats = device::load_shared_float4(stage + Config::kStats + 8 * row);  // {lse2, delta} of two rows
    const float lse2[2] = {stats.x, stats.z}, delta[2] = {stats.y, stats.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) p[n][i] = device::exp2_approx(p[n][i] * a.scale_log2 - lse2[i % 2]);
    if (masked) {
      const int2 last = device::load_shared_pair(stage + Config::kLastKeys + 4 * row);
      const int key = first_key + 16 * place.key_tile + lane / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + 8 * (i / 2) > (i % 2 ? last.y : last.x)) p[n][i] = 0.f;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) ds[n][i] = p[n][i] * (ds[n][i] - delta[i % 2]);
  }
  uint32_t operand[kSlice / 16][4];
  device::round_to_operand<Element, kSlice>(operand, p);
  device::multiply<Element, Config::kDv, kSlice, Config::kDvColumns>(sums.dv, operand, dout + 2 * place.half * Config::kDvColumns,
                                                                     lane);
  device::round_to_operand<Element, kSlice>(operand, ds);
  device::multiply<Element, Config::kDk, kSlice, Config::kDkColumns>(sums.dk, operand, q + 2 * place.half * Config::kDkColumns,
                                                                     lane);
}

// Adds the slices' sums, halving their number: slice s takes those of s + half. Every warp calls it.
template <typename Config>
__device__ __forceinline__ void add_slices(uint32_t shared, const WarpPlace& place, int warps_per_slice, int warp, int lane,
                                           Sums<Config>& sums) {
  constexpr int kDk = Config::kDkColumns / 8, kDv = Config::kDvColumns / 8;
  for (int half = place.num_slices / 2; half > 0; half /= 2) {
    __syncthreads();
    const bool gives = place.slice >= half && place.slice < 2 * half, takes = place.slice < half;
    const uint32_t at = shared + (warp - (gives ? half * warps_per_slice : 0)) * Config::kSumBytes + 16 * lane;
    if (gives) {
#pragma unroll
      for (int n = 0; n < kDk; ++n) device::store_shared_float4(at + 512 * n, sums.dk[n]);
#pragma unroll
      for (int n = 0; n < kDv; ++n) device::store_shared_float4(at + 512 * (kDk + n), sums.dv[n]);
    }
    __syncthreads();
    if (takes) {
#pragma unroll
      for (int n = 0; n < kDk + kDv; ++n) {
        float(&sum)[4] = n < kDk ? sums.dk[n < kDk ? n : 0] : sums.dv[n < kDk ? 0 : n - kDk];
        const float4 other = device::load_shared_float4(at + 512 * n);
        sum[0] += other.x;
        sum[1] += other.y;
        sum[2] += other.z;
        sum[3] += other.w;
      }
    }
  }
}

template <int kColumns>
__device__ __forceinline__ void store_partial(float* to, const float (&sum)[kColumns / 8][4], int r, int lane) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    *reinterpret_cast<float2*>(to + 8 * n + 2 * (lane & 3)) = {sum[n][2 * r], sum[n][2 * r + 1]};
  }
}

template <typename Config>
__device__ __forceinline__ void store_sums(const BackwardArgs& a, const Item& item, const WarpPlace& place, int lane,
                                           const Sums<Config>& sums) {
  using Element = typename Config::Element;
  const int dk_column = place.half * Config::kDkColumns, dv_column = place.half * Config::kDvColumns;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = 16 * place.key_tile + lane / 4 + 8 * r;
    if (key >= item.keys) continue;
    if (item.partial >= 0) {
      float* row = a.partials + (static_cast<int64_t>(item.partial) * a.plan.block_size + item.first_in_block + key) *
                                    (Config::kDk + Config::kDv);
      store_partial<Config::kDkColumns>(row + dk_column, sums.dk, r, lane);
      store_partial<Config::kDvColumns>(row + Config::kDk + dv_column, sums.dv, r, lane);
      continue;
    }
    const int k_row = item.first_key + key;
    if (a.dk.data) {
      device::store_row<Element, Config::kDkColumns>(a.dk.at(k_row, item.head) + 2 * dk_column, sums.dk, r, a.scale, lane);
    }
    if (a.dv.data) {
      device::store_row<Element, Config::kDvColumns>(a.dv.at(k_row, item.head) + 2 * dv_column, sums.dv, r, 1.f, lane);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) kernel(const __grid_constant__ BackwardArgs a, int stages) {
  extern __shared__ __align__(128) char shared_memory[];
  const uint32_t shared = device::shared_address(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Item item;
  if (!find_item<Config>(a, lane, item)) return;
  auto full = [&](int s) { return shared + 16 * s; };
  auto empty = [&](int s) { return shared + 16 * s + 8; };
  auto stage_at = [&](int s) { return shared + Config::kStages + s * Config::kStageBytes; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      device::barrier_init(full(s), Config::kThreads);
      device::barrier_init(empty(s), Config::kWarps);
    }
  }
  __syncthreads();

  const int key_tiles = min(a.plan.block_size, Config::kKeys) / 16;
  const int warps_per_slice = key_tiles * Config::kSplit;
  const WarpPlace place = {warp % key_tiles, warp / key_tiles % Config::kSplit, warp / warps_per_slice,
                           Config::kWarps / warps_per_slice};
  const uint32_t block = shared + Config::kBlock;
  Gather<Config> gather(a, item);
  const int iterations = (gather.rows + Config::kRows - 1) / Config::kRows;
  if (iterations > 0) {  // they arrive with the first stage
    const device::RowCopy<Config::kDk, Config::kThreads> copy_k(a.k.row_bytes, threadIdx.x);
    const device::RowCopy<Config::kDv, Config::kThreads> copy_v(a.v.row_bytes, threadIdx.x);
    copy_k.some(block, a.k.at(item.first_key, item.head), a.k.row_bytes, 16 * key_tiles, item.keys);
    copy_v.some(block + Config::kKeyBytes, a.v.at(item.first_key, item.head), a.v.row_bytes, 16 * key_tiles, item.keys);
  }
  for (int s = 0; s < min(stages, iterations); ++s) gather.copy(a, item.head, stage_at(s), full(s));

  Sums<Config> sums;
  device::clear(sums.dk);
  device::clear(sums.dv);
  int stage = 0, slice = 0;
  unsigned phase = 0;
  for (int i = 0; i < iterations; ++i) {
    if (i > 0 && i - 1 + stages < iterations) {  // refill the stage of the last iteration once every warp is done with it
      const int freed = stage > 0 ? stage - 1 : stages - 1;
      device::barrier_wait(empty(freed), stage > 0 ? phase : phase ^ 1);
      gather.copy(a, item.head, stage_at(freed), full(freed));
    }
    device::barrier_wait(full(stage), phase);
    // rows ascend, and so do their last keys: when the first row sees the whole block, all do
    const bool masked = device::load_shared(stage_at(stage) + Config::kLastKeys) < item.first_key + item.keys - 1;
    for (int row = 0; row < Config::kRows; row += Config::kSlice) {
      if (slice == place.slice) attend<Config>(a, block, stage_at(stage), row, place, item.first_key, masked, lane, sums);
      slice = slice + 1 == place.num_slices ? 0 : slice + 1;
    }
    __syncwarp();
    if (lane == 0) device::barrier_arrive(empty(stage));
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  add_slices<Config>(block, place, warps_per_slice, warp, lane, sums);
  if (place.slice == 0) store_sums<Config>(a, item, place, lane, sums);
}

}  // namespace nsa::sm80::selected_dkdv
