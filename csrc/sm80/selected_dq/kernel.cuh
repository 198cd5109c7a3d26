// dQ of selected attention: like the forward, warps of 16 query rows over the ring of their tile's blocks.
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   dQ = scale dS K
#pragma once

#include "sm80/selected_dq/config.h"

namespace nsa::sm80::selected_dq {

using cuda::BackwardArgs;
using device::KeyRing;
using device::QueryTile;
using device::Unit;

// Copies the warp's 16 rows of one tensor into its own shared memory; rows that don't exist become zeros.
template <int kDim>
__device__ __forceinline__ void copy_tile(uint32_t to, const cuda::TensorArg& from, const QueryTile& tile,
                                          const Unit& unit, const cuda::Divisor& group, int lane) {
  constexpr int kChunks = device::Tile<kDim>::kChunks;
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int r = i / kChunks, chunk = i - r * kChunks;
    const QueryTile::Row row = tile.row(unit, r, group);
    const char* source = row.real ? from.at(row.token, row.head) + 16 * chunk : from.data;
    device::copy16_async(to + device::Tile<kDim>::offset(r, chunk), source, row.real);
  }
}

template <typename Config>
__device__ __forceinline__ void load_rows(const BackwardArgs& a, const QueryTile& tile, const KeyRing<Config>& ring,
                                          int warp, int lane, const device::Visibility<Config>& sees, float (&lse2)[2],
                                          float (&delta)[2]) {
  const uint32_t own = ring.own(warp);
  const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
  const int first_token = Unit(a.plan.units, tile.first_unit, a.group).first_token;
  __syncwarp();  // every lane is done with the last tile's rows
  sees.copy_rows(tile, unit, first_token, a.plan, a.group, lane);
  copy_tile<Config::kDk>(own, a.q, tile, unit, a.group, lane);
  copy_tile<Config::kDv>(own + 16 * device::Tile<Config::kDk>::kRowBytes, a.dout, tile, unit, a.group, lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
    const int heads = a.num_heads_k * a.group;
    const cuda::RowStats stats =
        row.real ? a.stats[static_cast<int64_t>(row.token) * heads + row.head] : cuda::RowStats{INFINITY, 0.f};
    lse2[r] = stats.lse2;
    delta[r] = stats.delta;
  }
  device::wait_copies();
  __syncwarp();
}

// kStep keys of a stage, beginning at key `first`.
template <typename Config>
__device__ __forceinline__ void attend(const BackwardArgs& a, const KeyRing<Config>& ring,
                                       const device::Visibility<Config>& sees, const float (&lse2)[2],
                                       const float (&delta)[2], int first, int warp, int lane,
                                       float (&dq)[Config::kDk / 8][4]) {
  using Element = typename Config::Element;
  using TileK = device::Tile<Config::kDk>;
  constexpr int kStep = Config::kStep;
  const uint32_t own = ring.own(warp);
  const uint32_t keys = ring.keys() + first * TileK::kRowBytes;
  float s[kStep / 8][4], dp[kStep / 8][4];
  device::clear(s);
  device::clear(dp);
  device::multiply_transposed<Element, Config::kDk, kStep>(s, device::SharedOperand<Config::kDk>(own, lane), keys,
                                                           lane);
  device::multiply_transposed<Element, Config::kDv, kStep>(
      dp, device::SharedOperand<Config::kDv>(own + 16 * TileK::kRowBytes, lane),
      ring.values() + first * device::Tile<Config::kDv>::kRowBytes, lane);
#pragma unroll
  for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = device::exp2_approx(s[n][i] * a.scale_log2 - lse2[i / 2]) * (dp[n][i] - delta[i / 2]);
    }
  }
  if (!sees.everything() || device::is_negative(delta)) {
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = sees.sees(i / 2, first / 8 + n, i % 2, lane) ? device::signed_by(delta[i / 2], s[n][i]) : 0.f;
      }
    }
  }
  uint32_t ds[kStep / 16][4];
  device::round_to_operand<Element, kStep>(ds, s);
  device::multiply<Element, Config::kDk, kStep, Config::kDk>(dq, ds, keys, lane);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ BackwardArgs a, int stages, int warps,
           const __grid_constant__ cuda::Divisor tiles_per_head) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  KeyRing<Config> ring(shared, stages);
  if (threadIdx.x == 0) ring.init(32 * Config::kProducerWarps + 1, warps);
  __syncthreads();
  if (warp >= warps) {
    device::produce_tiles<Config>(a.plan, a.k, a.v, a.num_heads_k, a.group, warps, tiles_per_head, ring, warp - warps,
                                  lane);
    return;
  }
  device::Visibility<Config> sees(ring.shared, warp, lane);
  for (int t = ring.wait_tile(); t >= 0; t = ring.wait_tile()) {
    float lse2[2], delta[2], dq[Config::kDk / 8][4];
    load_rows<Config>(a, QueryTile(t, tiles_per_head, warps), ring, warp, lane, sees, lse2, delta);
    device::clear(dq);
    while (true) {
      if (sees.read(ring.info(), a.plan.block_size)) {
#pragma unroll 1
        for (int first = 0; first < Config::kKeys; first += Config::kStep) {
          attend<Config>(a, ring, sees, lse2, delta, first, warp, lane, dq);
        }
      }
      if (ring.is_last()) break;
      ring.release(lane);
      device::barrier_wait(ring.full(), ring.phase);
    }
    t = ring.wait_tile();  // again, rather than kept in a register
    ring.release(lane);
    const QueryTile tile(t, tiles_per_head, warps);
    const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
      if (row.real)
        device::store_row<typename Config::Element, Config::kDk>(a.dq.at(row.token, row.head), dq, r, a.scale, lane,
                                                                 a.accumulate_dq);
    }
  }
}

}  // namespace nsa::sm80::selected_dq
