// dK and dV of range attention: a CTA owns 64 keys and takes a chunk of the run of query rows that see them.
//   S^T = K Q^T   P^T = exp(S^T - lse)   dV = P^T dO   dP^T = V dO^T   dS^T = P^T (dP^T - delta)   dK = scale dS^T Q
// Sums stay in registers and are added in a fixed order: bitwise deterministic without atomics.
#pragma once

#include "device/range_sums.cuh"
#include "sm80/range_dkdv/config.h"

namespace nsa::sm80::range_dkdv {

using cuda::RangeBackwardArgs;

template <typename Config>
using Item = device::RangeItem<Config::kKeys>;

// Brings a stage of query rows, from row `first` of the item on. kThreadsPerRow threads copy a row; rows that don't
// exist become zeros everywhere, and so does what they add.
template <typename Config>
__device__ __forceinline__ void load_rows(const RangeBackwardArgs& a, const Item<Config>& item, int first, int rows,
                                          uint32_t stage) {
  constexpr int kThreadsPerRow = Config::kThreads / Config::kRows;
  constexpr int kChunksK = device::Tile<Config::kDk>::kChunks, kChunksV = device::Tile<Config::kDv>::kChunks;
  const int row = threadIdx.x / kThreadsPerRow, part = threadIdx.x % kThreadsPerRow;
  const int step = (first + row) / a.group;
  const bool real = first + row < rows;
  const int token = real ? item.begin + step : item.begin;
  const int head = item.head * a.group + first + row - step * a.group;
  const char* q = a.q.at(token, head);
  const char* dout = a.dout.at(token, head);
#pragma unroll
  for (int c = 0; c < (kChunksK + kThreadsPerRow - 1) / kThreadsPerRow; ++c) {
    const int chunk = c * kThreadsPerRow + part;
    if (kChunksK % kThreadsPerRow == 0 || chunk < kChunksK)
      device::copy16_async(stage + device::Tile<Config::kDk>::offset(row, chunk), q + 16 * chunk, real);
  }
#pragma unroll
  for (int c = 0; c < (kChunksV + kThreadsPerRow - 1) / kThreadsPerRow; ++c) {
    const int chunk = c * kThreadsPerRow + part;
    if (kChunksV % kThreadsPerRow == 0 || chunk < kChunksV)
      device::copy16_async(stage + Config::kDout + device::Tile<Config::kDv>::offset(row, chunk), dout + 16 * chunk,
                           real);
  }
  if (part == 0) {
    const int heads = a.num_heads_k * a.group;
    device::copy_row_stats(stage + Config::kLse + 4 * row, stage + Config::kDelta + 4 * row,
                           a.stats + static_cast<int64_t>(token) * heads + head, real);
  }
}

// kSlice query rows in shared memory against the warp's 16 keys.
template <typename Config>
__device__ __forceinline__ void attend(uint32_t block, uint32_t stage, int slice, int first_row, int key_tile, int half,
                                       const device::RowVisibility& sees, bool masked, float scale_log2, int lane,
                                       device::KeySums<Config>& sums) {
  using Element = typename Config::Element;
  using TileK = device::Tile<Config::kDk>;
  using TileV = device::Tile<Config::kDv>;
  constexpr int kSlice = Config::kSlice;
  const uint32_t q = stage + slice * TileK::kRowBytes;
  const uint32_t dout = stage + Config::kDout + slice * TileV::kRowBytes;
  const uint32_t lse2 = stage + Config::kLse + 4 * slice, delta = stage + Config::kDelta + 4 * slice;
  float p[kSlice / 8][4], ds[kSlice / 8][4];
  device::clear(p);
  device::clear(ds);
  device::multiply_transposed<Element, Config::kDk, kSlice>(
      p, device::SharedOperand<Config::kDk>(block + key_tile * 16 * TileK::kRowBytes, lane), q, lane);
  device::multiply_transposed<Element, Config::kDv, kSlice>(
      ds, device::SharedOperand<Config::kDv>(block + Config::kKeyBytes + key_tile * 16 * TileV::kRowBytes, lane), dout,
      lane);
  device::range_probabilities(p, lse2, delta, first_row, sees, masked, scale_log2, lane);
  device::range_gradients(p, ds, delta, first_row, sees, masked, lane);
  uint32_t operand[kSlice / 16][4];
  device::round_to_operand<Element, kSlice>(operand, p);
  device::multiply<Element, Config::kDv, kSlice, Config::kDvColumns>(sums.dv, operand,
                                                                     dout + 2 * half * Config::kDvColumns, lane);
  device::round_to_operand<Element, kSlice>(operand, ds);
  device::multiply<Element, Config::kDk, kSlice, Config::kDkColumns>(sums.dk, operand,
                                                                     q + 2 * half * Config::kDkColumns, lane);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ RangeBackwardArgs a, int tiles_per_head) {
  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t shared = device::shared_address(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // CTAs that run together take the same query rows against neighbouring keys
  const Item<Config> item(a.plan, blockIdx.z, blockIdx.x, blockIdx.y);
  if (!item.real) return;
  const uint32_t block = shared;
  auto stage_at = [&](int i) { return shared + Config::kBlockBytes + i % Config::kStages * Config::kStageBytes; };
  const int rows = item.tokens * a.group;
  const int stages = (rows + Config::kRows - 1) / Config::kRows;
  if (stages > 0) {  // they arrive with the first stage
    const device::RowCopy<device::Tile<Config::kDk>, Config::kThreads> copy_k(a.k.row_bytes, threadIdx.x);
    const device::RowCopy<device::Tile<Config::kDv>, Config::kThreads> copy_v(a.v.row_bytes, threadIdx.x);
    copy_k.some(block, a.k.at(item.first_key, item.head), a.k.row_bytes, Config::kKeys, item.keys);
    copy_v.some(block + Config::kKeyBytes, a.v.at(item.first_key, item.head), a.v.row_bytes, Config::kKeys, item.keys);
  }
  auto load = [&](int i) {
    if (i < stages) load_rows<Config>(a, item, i * Config::kRows, rows, stage_at(i));
    device::commit_copies();
  };
#pragma unroll
  for (int i = 0; i < Config::kStages - 1; ++i) load(i);

  const int key_tile = warp % 4, half = Config::kSplit == 2 ? warp / 4 : 0, slice = Config::kSplit == 2 ? 0 : warp / 4;
  device::RowVisibility sees;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = 16 * key_tile + lane / 4 + 8 * r;
    sees.set_key(r, key < item.keys, item.first_key + key, item.begin, a.group, a.plan);
  }
  const int2 seen = item.rows_of_all(a.plan, a.group);
  const bool negative = a.negative && *a.negative;
  device::KeySums<Config> sums;
  sums.reset();
  for (int i = 0; i < stages; ++i) {
    device::wait_copies_but<Config::kStages - 2>();
    __syncthreads();  // the stage has landed, and everybody is done with the one before it
    load(i + Config::kStages - 1);
    const int first_row = i * Config::kRows;
    const bool masked = negative || first_row < seen.x || first_row + Config::kRows > seen.y;
#pragma unroll 1
    for (int row = slice * Config::kSlice; row < Config::kRows; row += Config::kSlices * Config::kSlice) {
      attend<Config>(block, stage_at(i), row, first_row + row, key_tile, half, sees, masked, a.scale_log2, lane, sums);
    }
  }
  if constexpr (Config::kSlices == 2) {
    const uint32_t at = shared + (warp % 4) * Config::kSumBytes + 16 * lane;
    device::wait_copies();
    __syncthreads();
    if (slice == 1) sums.leave(at);
    __syncthreads();
    if (slice == 1) return;
    sums.add(at);
  }
  device::store_range_sums<Config>(a, item, 16 * key_tile, half, lane, sums);
}

}  // namespace nsa::sm80::range_dkdv
