// dQ of selected attention on Hopper: like the forward, warpgroups of 4 units (64 rows) over the ring of their tile's
// blocks.
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   dQ = scale dS K
#pragma once

#include "device/warpgroup_tile.cuh"
#include "sm90/selected_dq/config.h"

namespace nsa::sm90::selected_dq {

using cuda::BackwardArgs;
using device::KeyRing;
using device::QueryTile;
using device::Unit;

// The products of the walk (device/warpgroup_tile.cuh): S = Q K^T and dP = dO V^T, dQ += dS K.
template <typename Config>
struct Pass {
  using Element = typename Config::Element;
  static constexpr int kKeys = Config::kKeys;
  const KeyRing<Config>& ring;
  device::Visibility<Config> sees;
  uint32_t q, dout;  // the warpgroup's rows in shared memory
  int warp, lane, block_size;
  float scale_log2;
  float lse2[2], delta[2];  // of the lane's two rows
  float dq[Config::kDk / 8][4];
  float s[kKeys / 8][4], dp[kKeys / 8][4];
  uint32_t ds[kKeys / 16][4];
  bool any;

  __device__ __forceinline__ Pass(const BackwardArgs& a, const KeyRing<Config>& ring_, int warp_, int lane_)
      : ring(ring_),
        sees(ring_, warp_, lane_),
        q(ring_.own(warp_ / 4 * 4)),
        dout(q + 64 * 2 * Config::kDk),
        warp(warp_),
        lane(lane_),
        block_size(a.plan.block_size),
        scale_log2(a.scale_log2) {}

  __device__ __forceinline__ void load(const BackwardArgs& a, const QueryTile& tile) {
    const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
    const int first_token = Unit(a.plan.units, tile.first_unit, a.group).first_token;
    device::copy_unit<Config::kDk>(q, a.q, tile, unit, a.group, warp, lane);
    device::copy_unit<Config::kDv>(dout, a.dout, tile, unit, a.group, warp, lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
      sees.set_row(r, row, first_token, a.plan);
      const int heads = a.num_heads_k * a.group;
      const cuda::RowStats stats =
          row.real ? a.stats[static_cast<int64_t>(row.token) * heads + row.head] : cuda::RowStats{INFINITY, 0.f};
      lse2[r] = stats.lse2;
      delta[r] = stats.delta;
    }
  }
  __device__ __forceinline__ void store(const BackwardArgs& a, const QueryTile& tile) const {
    const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
      char* to = row.real ? a.dq.at(row.token, row.head) : nullptr;
      device::store_row_wide<Element, Config::kDk>(to, row.real, dq, r, a.scale, lane, a.accumulate_dq);
    }
  }

  __device__ __forceinline__ void start_scores(int stage) {
    device::start_transposed<Element, Config::kDk, kKeys>(s, q, ring.keys(stage));
    device::start_transposed<Element, Config::kDv, kKeys>(dp, dout, ring.values(stage));
  }
  __device__ __forceinline__ void start_sum(int stage) {
    device::start_columns<Element, kKeys, Config::kDk>(dq, ds, ring.keys(stage));
  }
  __device__ __forceinline__ void hold_scores() {
    device::hold(s);
    device::hold(dp);
  }
  __device__ __forceinline__ void hold_sum() { device::hold(dq); }
  // A warp whose unit chose nothing of the stage adds nothing.
  __device__ __forceinline__ void weigh(int stage, unsigned flags) {
    any = (flags & device::StageFlags::any(warp)) != 0;
    if (!any) return;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = device::exp2_approx(s[n][i] * scale_log2 - lse2[i / 2]) * (dp[n][i] - delta[i / 2]);
      }
    }
    if ((flags & device::StageFlags::all(warp)) && !__any_sync(device::kFullWarp, device::is_negative(delta))) return;
    sees.read(ring.info(stage), block_size);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = sees.sees(i / 2, n, i % 2, lane) ? device::signed_by(delta[i / 2], s[n][i]) : 0.f;
      }
    }
  }
  __device__ __forceinline__ unsigned unit_flag() const { return device::StageFlags::any(warp); }
  __device__ __forceinline__ void attend(int stage, unsigned flags) {
    int lane = this->lane;
    asm volatile("" : "+r"(lane));  // or the addresses stay in registers from stage to stage: (192, 128) spilled
    device::clear(s);
    device::clear(dp);
    const device::SharedOperand<Config::kDk, device::BoxTile<Config::kDk, 64>> q_rows(q + warp % 4 * 16 * 128, lane);
    device::multiply_transposed<Element, Config::kDk, kKeys, typename Config::TileK>(s, q_rows, ring.keys(stage), lane);
    const device::SharedOperand<Config::kDv, device::BoxTile<Config::kDv, 64>> out_rows(dout + warp % 4 * 16 * 128,
                                                                                        lane);
    device::multiply_transposed<Element, Config::kDv, kKeys, typename Config::TileV>(dp, out_rows, ring.values(stage),
                                                                                     lane);
    weigh(stage, flags);
    settle();
    device::multiply<Element, Config::kDk, kKeys, Config::kDk, typename Config::TileK>(dq, ds, ring.keys(stage), lane);
  }
  __device__ __forceinline__ void settle() {
    if (any) {
      device::round_to_operand<Element, kKeys>(ds, s);
    } else {
      device::clear(ds);
    }
  }
};

// As in the forward, the next tile's rows are on their way while this one's dQ is written.
template <typename Config>
__device__ __forceinline__ void consume(const BackwardArgs& a, KeyRing<Config>& ring, int warps,
                                        const cuda::Divisor& tiles_per_head, int warp, int lane) {
  const int warpgroup = warp / 4, tiles = tiles_per_head * a.num_heads_k;
  Pass<Config> pass(a, ring, warp, lane);
  int t = blockIdx.x;
  pass.load(a, QueryTile(t, tiles_per_head, warps));
  for (; t < tiles; t += gridDim.x) {
    device::clear(pass.dq);
    device::wait_copies();
    device::fence_shared_for_wgmma();
    device::sync_warpgroup(warpgroup);
    device::walk_stages<Config>(ring, warpgroup, lane, pass);
    const int next = __shfl_sync(device::kFullWarp, t + gridDim.x, 0);  // uniform, or it takes a register
    if (next < tiles) pass.load(a, QueryTile(next, tiles_per_head, warps));
    pass.store(a, QueryTile(t, tiles_per_head, warps));
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ BackwardArgs a, const __grid_constant__ cuda::KeyMaps maps, int stages, int warps,
           const __grid_constant__ cuda::Divisor tiles_per_head) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = __shfl_sync(device::kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  KeyRing<Config> ring(shared, stages);
  if (threadIdx.x == 0) ring.init(device::kWarpArrivals, warps);
  __syncthreads();
  if (warp >= warps) {
    device::give_registers<Config::kProducerRegisters>();
    if (warp > warps) return;
    device::TmaProducer<Config>{a.unions, a.k, a.v, maps, a.num_heads_k, lane}.run(ring);
  } else {
    device::take_registers<Config::kConsumerRegisters>();
    consume<Config>(a, ring, warps, tiles_per_head, warp, lane);
  }
}

}  // namespace nsa::sm90::selected_dq
