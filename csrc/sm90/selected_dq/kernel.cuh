// dQ of selected attention on Hopper: like the forward, warpgroups of 4 units (64 rows) over the ring of their tile's
// blocks.
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   dQ = scale dS K
#pragma once

#include "device/warpgroup.cuh"
#include "sm90/selected_dq/config.h"

namespace nsa::sm90::selected_dq {

using cuda::BackwardArgs;
using device::KeyRing;
using device::QueryTile;
using device::Unit;

// A lane's two rows, and where the warpgroup's Q and dO lie in shared memory.
struct Rows {
  uint32_t q, dout;
  float lse2[2], delta[2];
};

template <typename Config>
__device__ __forceinline__ void load_rows(const BackwardArgs& a, const QueryTile& tile, int warp, int lane,
                                          const device::Visibility<Config>& sees, Rows& rows) {
  const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
  const int first_token = Unit(a.plan.units, tile.first_unit, a.group).first_token;
  device::copy_unit<Config::kDk>(rows.q, a.q, tile, unit, a.group, warp, lane);
  device::copy_unit<Config::kDv>(rows.dout, a.dout, tile, unit, a.group, warp, lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
    sees.set_row(r, row, first_token, a.plan);
    const int heads = a.num_heads_k * a.group;
    const cuda::RowStats stats =
        row.real ? a.stats[static_cast<int64_t>(row.token) * heads + row.head] : cuda::RowStats{INFINITY, 0.f};
    rows.lse2[r] = stats.lse2;
    rows.delta[r] = stats.delta;
  }
  device::wait_copies();
  device::fence_shared_for_wgmma();
  device::sync_warpgroup(warp / 4);
}

// One stage of keys, by all four warps; a warp whose unit sees nothing of it adds nothing.
template <typename Config>
__device__ __forceinline__ void attend(const BackwardArgs& a, const Rows& rows, const KeyRing<Config>& ring,
                                       const device::Visibility<Config>& sees, bool any, int lane,
                                       float (&dq)[Config::kDk / 8][4]) {
  using Element = typename Config::Element;
  constexpr int kKeys = Config::kKeys;
  float s[kKeys / 8][4], dp[kKeys / 8][4];
  device::fence_shared_for_wgmma();
  device::wgmma_fence();
  device::start_transposed<Element, Config::kDk, kKeys>(s, rows.q, ring.keys());
  device::start_transposed<Element, Config::kDv, kKeys>(dp, rows.dout, ring.values());
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::hold(s);
  device::hold(dp);
  uint32_t ds[kKeys / 16][4] = {};
  if (any) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = device::exp2_approx(s[n][i] * a.scale_log2 - rows.lse2[i / 2]) * (dp[n][i] - rows.delta[i / 2]);
      }
    }
    if (!sees.everything()) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!sees.sees(i / 2, n, i % 2, lane)) s[n][i] = 0.f;
        }
      }
    }
    device::round_to_operand<Element, kKeys>(ds, s);
  }
  device::hold(dq);
  device::wgmma_fence();
  device::start_columns<Element, kKeys, Config::kDk>(dq, ds, ring.keys());
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::hold(dq);
}

template <typename Config>
__device__ __forceinline__ void consume(const BackwardArgs& a, KeyRing<Config>& ring, int warps, int tiles_per_head,
                                        int warp, int lane) {
  const int warpgroup = warp / 4;
  Rows rows;
  rows.q = ring.own(4 * warpgroup);
  rows.dout = rows.q + 64 * 2 * Config::kDk;
  device::Visibility<Config> sees(ring, warp, lane);
  for (int t = ring.wait_tile(); t >= 0; t = ring.wait_tile()) {
    float dq[Config::kDk / 8][4];
    device::GroupTokens tokens(a.plan.units, QueryTile(t, tiles_per_head, warps), warpgroup, a.group);
    load_rows<Config>(a, QueryTile(t, tiles_per_head, warps), warp, lane, sees, rows);
    device::clear(dq);
    while (true) {
      if (tokens.any(ring, a.plan.block_size)) {
        const bool any = sees.read(ring, a.plan.block_size);
        attend<Config>(a, rows, ring, sees, any, lane, dq);
      }
      if (ring.is_last()) break;
      ring.release(lane);
      device::barrier_wait(ring.full(), ring.phase);
    }
    t = ring.wait_tile();  // again, rather than kept in a register
    ring.release(lane);
    device::sync_warpgroup(warpgroup);  // nobody reads this tile's Q and dO any more
    const QueryTile tile(t, tiles_per_head, warps);
    const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
      if (row.real)
        device::store_row<typename Config::Element, Config::kDk>(a.dq.at(row.token, row.head), dq, r, a.scale, lane);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ BackwardArgs a, int stages, int warps, int tiles_per_head) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = __shfl_sync(device::kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  KeyRing<Config> ring(shared, stages);
  if (threadIdx.x == 0) ring.init(warps);
  __syncthreads();
  if (warp >= warps) {
    device::give_registers<Config::kProducerRegisters>();
    device::produce_tiles<Config>(a.plan, a.k, a.v, a.num_heads_k, a.group, warps, tiles_per_head, ring, warp - warps,
                                  lane);
  } else {
    device::take_registers<Config::kConsumerRegisters>();
    consume<Config>(a, ring, warps, tiles_per_head, warp, lane);
  }
}

}  // namespace nsa::sm90::selected_dq
