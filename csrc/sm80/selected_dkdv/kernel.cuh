// dK and dV of selected attention: a CTA owns keys of one block and gathers the query rows that chose it (inverted
// index).
//   S^T = K Q^T   P^T = exp(S^T - lse)   dV = P^T dO   dP^T = V dO^T   dS^T = P^T (dP^T - delta)   dK = scale dS^T Q
// Sums stay in registers and are added in a fixed order: bitwise deterministic without atomics.
#pragma once

#include "device/key_item.cuh"
#include "sm80/selected_dkdv/config.h"

namespace nsa::sm80::selected_dkdv {

using cuda::BackwardArgs;
using device::Item;

// Brings query rows into stages. Four threads copy a row of 64 (eight one of 32); the row's token is read one stage
// ahead.
template <typename Config>
struct Gather {
  static constexpr int kThreadsPerRow = Config::kThreads / Config::kRows;
  const int32_t* tokens;
  int rows;  // entries * G
  int next;  // row that this thread copies next
  int token;
  bool real;

  __device__ __forceinline__ Gather(const BackwardArgs& a, const Item& item)
      : tokens(a.index.rows + item.begin), rows(item.entries * a.group), next(threadIdx.x / kThreadsPerRow) {
    read(a.group);
  }
  __device__ __forceinline__ void read(const cuda::Divisor& group) {
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
      device::copy16_async(stage + Config::kDout + device::Tile<Config::kDv>::offset(row, chunk), dout + 16 * chunk,
                           real);
    }
    if (part == 0) {  // rows that don't exist become zeros everywhere, and so does what they add
      const int heads = a.num_heads_k * a.group;
      device::copy_row_stats(stage + Config::kLse + 4 * row, stage + Config::kDelta + 4 * row,
                             a.stats + static_cast<int64_t>(token) * heads + head, real);
      device::copy4_async(stage + Config::kLastKeys + 4 * row, a.plan.last_key + token, real);
    }
    device::barrier_arrive_after_copies(full);
    next += Config::kRows;
    read(a.group);
  }
};

// Which keys, columns and slices are a warp's.
struct WarpPlace {
  int key_tile, half, slice, num_slices;
};

// kSlice query rows against the warp's 16 keys.
template <typename Config>
__device__ __forceinline__ void attend(const BackwardArgs& a, uint32_t block, uint32_t stage, int first_row,
                                       const WarpPlace& place, int first_key, bool masked, int lane,
                                       device::KeySums<Config>& sums) {
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
      ds, device::SharedOperand<Config::kDv>(block + Config::kKeyBytes + place.key_tile * 16 * TileV::kRowBytes, lane),
      dout, lane);
  const uint32_t delta = stage + Config::kDelta + 4 * first_row;
  device::key_probabilities(p, stage + Config::kLse + 4 * first_row, delta, stage + Config::kLastKeys + 4 * first_row,
                            first_key + 16 * place.key_tile + lane / 4, masked, a.scale_log2, lane);
  device::key_gradients(p, ds, delta, lane);
  uint32_t operand[kSlice / 16][4];
  device::round_to_operand<Element, kSlice>(operand, p);
  device::multiply<Element, Config::kDv, kSlice, Config::kDvColumns>(sums.dv, operand,
                                                                     dout + 2 * place.half * Config::kDvColumns, lane);
  device::round_to_operand<Element, kSlice>(operand, ds);
  device::multiply<Element, Config::kDk, kSlice, Config::kDkColumns>(sums.dk, operand,
                                                                     q + 2 * place.half * Config::kDkColumns, lane);
}

// Adds the slices' sums, halving their number: slice s takes those of s + half. Every warp calls it.
template <typename Config>
__device__ __forceinline__ void add_slices(uint32_t shared, const WarpPlace& place, int warps_per_slice, int warp,
                                           int lane, device::KeySums<Config>& sums) {
  for (int half = place.num_slices / 2; half > 0; half /= 2) {
    __syncthreads();
    const bool gives = place.slice >= half && place.slice < 2 * half, takes = place.slice < half;
    const uint32_t at = shared + (warp - (gives ? half * warps_per_slice : 0)) * Config::kSumBytes + 16 * lane;
    if (gives) sums.leave(at);
    __syncthreads();
    if (takes) sums.add(at);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) kernel(const __grid_constant__ BackwardArgs a, int stages) {
  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t shared = device::shared_address(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Item item;
  if (!device::find_item<Config::kKeys>(a, item)) return;
  auto full = [&](int s) { return shared + 16 * s; };
  auto empty = [&](int s) { return shared + 16 * s + 8; };
  auto stage_at = [&](int s) { return shared + Config::kStages + s * Config::kStageBytes; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      device::barrier_init(full(s), Config::kThreads);
      device::barrier_init(empty(s), Config::kWarps * device::kWarpArrivals);
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
    const device::RowCopy<device::Tile<Config::kDk>, Config::kThreads> copy_k(a.k.row_bytes, threadIdx.x);
    const device::RowCopy<device::Tile<Config::kDv>, Config::kThreads> copy_v(a.v.row_bytes, threadIdx.x);
    copy_k.some(block, a.k.at(item.first_key, item.head), a.k.row_bytes, 16 * key_tiles, item.keys);
    copy_v.some(block + Config::kKeyBytes, a.v.at(item.first_key, item.head), a.v.row_bytes, 16 * key_tiles, item.keys);
  }
  for (int s = 0; s < min(stages, iterations); ++s) gather.copy(a, item.head, stage_at(s), full(s));

  device::KeySums<Config> sums;
  sums.reset();
  const bool negative = a.negative && *a.negative;
  int stage = 0, slice = 0;
  unsigned phase = 0;
  for (int i = 0; i < iterations; ++i) {
    if (i > 0 &&
        i - 1 + stages < iterations) {  // refill the stage of the last iteration once every warp is done with it
      const int freed = stage > 0 ? stage - 1 : stages - 1;
      device::barrier_wait(empty(freed), stage > 0 ? phase : phase ^ 1);
      gather.copy(a, item.head, stage_at(freed), full(freed));
    }
    device::barrier_wait(full(stage), phase);
    // rows ascend, and so do their last keys: when the first row sees the whole block, all do
    const bool masked =
        negative || device::load_shared(stage_at(stage) + Config::kLastKeys) < item.first_key + item.keys - 1;
    for (int row = 0; row < Config::kRows; row += Config::kSlice) {
      if (slice == place.slice)
        attend<Config>(a, block, stage_at(stage), row, place, item.first_key, masked, lane, sums);
      slice = slice + 1 == place.num_slices ? 0 : slice + 1;
    }
    device::arrive_for_warp(empty(stage), lane);
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  add_slices<Config>(block, place, warps_per_slice, warp, lane, sums);
  if (place.slice == 0) device::store_sums<Config>(a, item, 16 * place.key_tile, place.half, lane, sums);
}

}  // namespace nsa::sm80::selected_dkdv
