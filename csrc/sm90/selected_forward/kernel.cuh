// o and lse of selected attention on Hopper: warpgroups of 4 units (64 rows) over the ring of their tile's blocks
// (device/query_tile.cuh), products by wgmma.
#pragma once

#include "device/softmax.cuh"
#include "device/warpgroup_tile.cuh"
#include "sm90/selected_forward/config.h"

namespace nsa::sm90::selected_forward {

using cuda::ForwardArgs;
using device::BlockRing;
using device::QueryTile;
using device::Unit;

struct KeyMaps {
  CUtensorMap k, v;
};

// Asks for Q of the warp's rows and what they see.
template <typename Config>
__device__ __forceinline__ void load_rows(const ForwardArgs& a, const QueryTile& tile, uint32_t q, int warp, int lane,
                                          const device::Visibility<Config>& sees) {
  const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
  const int first_token = Unit(a.plan.units, tile.first_unit, a.group).first_token;
  sees.copy_rows(tile, unit, first_token, a.plan, a.group, lane);
  device::copy_unit<Config::kDk>(q, a.q, tile, unit, a.group, warp, lane);
}

// The products of the walk (device/warpgroup_tile.cuh): S = Q K^T, O += P V.
template <typename Config>
struct Pass {
  using Element = typename Config::Element;
  const BlockRing<Config>& ring;
  device::Visibility<Config> sees;
  uint32_t q;
  int warp, lane, block_size;
  float scale_log2;
  device::OnlineSoftmax<Config::kDv> softmax;
  float s[Config::kKeys / 8][4];
  uint32_t p[Config::kKeys / 16][4];

  __device__ __forceinline__ Pass(const ForwardArgs& a, const BlockRing<Config>& ring_, int warp_, int lane_)
      : ring(ring_),
        sees(ring_.shared, warp_, lane_),
        q(ring_.own(warp_ / 4 * 4)),
        warp(warp_),
        lane(lane_),
        block_size(a.plan.block_size),
        scale_log2(a.scale_log2) {}

  __device__ __forceinline__ void start_scores(int stage) {
    device::start_transposed<Element, Config::kDk, Config::kKeys>(s, q, ring.keys(stage));
  }
  __device__ __forceinline__ void start_sum(int stage) {
    device::start_columns<Element, Config::kKeys, Config::kDv>(softmax.o, p, ring.values(stage));
  }
  __device__ __forceinline__ void hold_scores() { device::hold(s); }
  __device__ __forceinline__ void hold_sum() { device::hold(softmax.o); }
  // A warp whose unit chose nothing of the stage adds nothing.
  __device__ __forceinline__ void weigh(int stage, unsigned flags) {
    if (!(flags & device::StageFlags::any(warp))) {
      device::clear(p);
      return;
    }
    sees.set_everything();
    if (!(flags & device::StageFlags::all(warp))) sees.read(ring.info(stage), block_size);
    float scale = scale_log2, factor[2];
    if (softmax.follow_maximum(s, factor, sees, scale, lane)) softmax.rescale(factor);
    softmax.exponentiate(s, scale);
    device::round_to_operand<Element, Config::kKeys>(p, s);
  }
  __device__ __forceinline__ unsigned unit_flag() const { return device::StageFlags::any(warp); }
  __device__ __forceinline__ void score(int stage) {
    device::clear(s);
    const device::SharedOperand<Config::kDk, device::BoxTile<Config::kDk, 64>> rows(q + warp % 4 * 16 * 128, lane);
    device::multiply_transposed<Element, Config::kDk, Config::kKeys, typename Config::TileK>(s, rows, ring.keys(stage),
                                                                                             lane);
  }
  __device__ __forceinline__ void add(int stage, unsigned flags) {
    weigh(stage, flags);
    device::multiply<Element, Config::kDv, Config::kKeys, Config::kDv, typename Config::TileV>(
        softmax.o, p, ring.values(stage), lane);
  }
};

// The CTA's tiles are the producers'. The next tile's Q is on its way while this one's o is written: loading it between
// the two cost 4 us a tile, a tenth of the whole.
template <typename Config>
__device__ __forceinline__ void consume(const ForwardArgs& a, BlockRing<Config>& ring,
                                        const cuda::Divisor& tiles_per_head, int warp, int lane) {
  constexpr int kWarps = Config::kMaxWarps;
  const int warpgroup = warp / 4, tiles = tiles_per_head * a.num_heads_k;
  Pass<Config> pass(a, ring, warp, lane);
  int t = blockIdx.x;
  load_rows<Config>(a, QueryTile(t, tiles_per_head, kWarps), pass.q, warp, lane, pass.sees);
  for (; t < tiles; t += gridDim.x) {
    device::wait_copies();
    device::fence_shared_for_wgmma();
    device::sync_warpgroup(warpgroup);
    pass.softmax.reset();
    device::walk_stages<Config>(ring, warpgroup, lane, pass);
    const int next = __shfl_sync(device::kFullWarp, t + gridDim.x, 0);  // uniform, or it takes a register
    if (next < tiles) load_rows<Config>(a, QueryTile(next, tiles_per_head, kWarps), pass.q, warp, lane, pass.sees);
    pass.softmax.template store<typename Config::Element>(a, QueryTile(t, tiles_per_head, kWarps), warp, lane);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ KeyMaps maps,
           const __grid_constant__ cuda::Divisor tiles_per_head) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int kWarps = Config::kMaxWarps;
  const int warp = __shfl_sync(device::kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  BlockRing<Config> ring(shared);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  if (warp >= kWarps) {
    device::give_registers<Config::kProducerRegisters>();
    if (warp - kWarps >= Config::kProducers) return;
    // one kv head after the other: its K and V stay in the L2
    device::TmaProducer<Config>{a.unions, a.k, a.v, &maps.k, &maps.v, lane}.run(
        ring, warp - kWarps, tiles_per_head * a.num_heads_k, [](int t) { return t; });
  } else {
    device::take_registers<Config::kConsumerRegisters>();
    consume<Config>(a, ring, tiles_per_head, warp, lane);
  }
}

}  // namespace nsa::sm90::selected_forward
