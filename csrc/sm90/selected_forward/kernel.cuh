// o and lse of selected attention on Hopper: warpgroups of 4 units (64 rows) over the ring of their tile's blocks
// (device/query_tile.cuh), products by wgmma.
#pragma once

#include "device/softmax.cuh"
#include "device/warpgroup.cuh"
#include "sm90/selected_forward/config.h"

namespace nsa::sm90::selected_forward {

using cuda::ForwardArgs;
using device::KeyRing;
using device::QueryTile;
using device::Unit;

// Q of the warpgroup's rows into shared memory.
template <typename Config>
__device__ __forceinline__ void load_rows(const ForwardArgs& a, const QueryTile& tile, uint32_t q, int warp, int lane,
                                          const device::Visibility<Config>& sees) {
  const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
  const int first_token = Unit(a.plan.units, tile.first_unit, a.group).first_token;
  device::copy_unit<Config::kDk>(q, a.q, tile, unit, a.group, warp, lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) sees.set_row(r, tile.row(unit, lane / 4 + 8 * r, a.group), first_token, a.plan);
  device::wait_copies();
  device::fence_shared_for_wgmma();
  device::sync_warpgroup(warp / 4);
}

// One stage of keys, by all four warps; a warp whose unit sees nothing of it adds nothing.
template <typename Config>
__device__ __forceinline__ void attend(device::OnlineSoftmax<Config::kDv>& softmax, uint32_t q,
                                       const KeyRing<Config>& ring, const device::Visibility<Config>& sees, bool any,
                                       float scale_log2, int lane) {
  using Element = typename Config::Element;
  float s[Config::kKeys / 8][4];
  device::fence_shared_for_wgmma();
  device::wgmma_fence();
  device::start_transposed<Element, Config::kDk, Config::kKeys>(s, q, ring.keys());
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::hold(s);
  uint32_t p[Config::kKeys / 16][4] = {};
  if (any) {
    softmax.update(s, sees, scale_log2, lane);
    device::round_to_operand<Element, Config::kKeys>(p, s);
  }
  device::hold(softmax.o);
  device::wgmma_fence();
  device::start_columns<Element, Config::kKeys, Config::kDv>(softmax.o, p, ring.values());
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::hold(softmax.o);
}

template <typename Config>
__device__ __forceinline__ void consume(const ForwardArgs& a, KeyRing<Config>& ring, int warps, int tiles_per_head,
                                        int warp, int lane) {
  const int warpgroup = warp / 4;
  const uint32_t q = ring.own(4 * warpgroup);
  device::Visibility<Config> sees(ring, warp, lane);
  for (int t = ring.wait_tile(); t >= 0; t = ring.wait_tile()) {
    device::OnlineSoftmax<Config::kDv> softmax;
    device::GroupTokens tokens(a.plan.units, QueryTile(t, tiles_per_head, warps), warpgroup, a.group);
    load_rows<Config>(a, QueryTile(t, tiles_per_head, warps), q, warp, lane, sees);
    softmax.reset();
    while (true) {
      if (tokens.any(ring, a.plan.block_size)) {
        const bool any = sees.read(ring, a.plan.block_size);
        attend<Config>(softmax, q, ring, sees, any, a.scale_log2, lane);
      }
      if (ring.is_last()) break;
      ring.release(lane);
      device::barrier_wait(ring.full(), ring.phase);
    }
    t = ring.wait_tile();  // again, rather than kept in a register
    ring.release(lane);
    device::sync_warpgroup(warpgroup);  // nobody reads this tile's Q any more
    softmax.template store<typename Config::Element>(a, QueryTile(t, tiles_per_head, warps), warp, lane);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ ForwardArgs a, int stages, int warps, int tiles_per_head) {
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

}  // namespace nsa::sm90::selected_forward
