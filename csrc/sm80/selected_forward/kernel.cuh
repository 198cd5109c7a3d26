// o and lse of selected attention: warps of 16 query rows over the ring of their tile's blocks (device/query_tile.cuh).
#pragma once

#include "device/softmax.cuh"
#include "sm80/selected_forward/config.h"

namespace nsa::sm80::selected_forward {

using cuda::ForwardArgs;
using device::KeyRing;
using device::QueryTile;
using device::Unit;

template <typename Config>
struct Rows {
  device::RegisterOperand<Config::kDk> q;
  device::OnlineSoftmax<Config::kDv> softmax;
};

template <typename Config>
__device__ __forceinline__ void load_rows(const ForwardArgs& a, const QueryTile& tile, int warp, int lane,
                                          const device::Visibility<Config>& sees, Rows<Config>& rows) {
  const char* q[2];
  const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
  const int first_token = Unit(a.plan.units, tile.first_unit, a.group).first_token;
  sees.copy_rows(tile, unit, first_token, a.plan, a.group, lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
    q[r] = row.real ? a.q.at(row.token, row.head) + 4 * (lane & 3) : nullptr;
  }
#pragma unroll
  for (int step = 0; step < Config::kDk / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* from = q[i & 1];
      rows.q.fragments[step][i] = from ? __ldg(reinterpret_cast<const unsigned*>(from + 32 * step + 16 * (i >> 1))) : 0;
    }
  }
  rows.softmax.reset();
  device::wait_copies();
  __syncwarp();
}

// One stage of keys.
template <typename Config>
__device__ __forceinline__ void attend(Rows<Config>& rows, const KeyRing<Config>& ring,
                                       const device::Visibility<Config>& sees, float scale_log2, int lane) {
  using Element = typename Config::Element;
  float s[Config::kKeys / 8][4];
  device::clear(s);
  device::multiply_transposed<Element, Config::kDk, Config::kKeys>(s, rows.q, ring.keys(), lane);
  float factor[2];
  if (rows.softmax.follow_maximum(s, factor, sees, scale_log2, lane)) rows.softmax.rescale(factor);
  rows.softmax.exponentiate(s, scale_log2);
  uint32_t p[Config::kKeys / 16][4];
  device::round_to_operand<Element, Config::kKeys>(p, s);
  device::multiply<Element, Config::kDv, Config::kKeys, Config::kDv>(rows.softmax.o, p, ring.values(), lane);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ ForwardArgs a, int stages, int warps,
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
    Rows<Config> rows;
    load_rows<Config>(a, QueryTile(t, tiles_per_head, warps), warp, lane, sees, rows);
    while (true) {
      if (sees.read(ring.info(), a.plan.block_size)) attend<Config>(rows, ring, sees, a.scale_log2, lane);
      if (ring.is_last()) break;
      ring.release(lane);
      device::barrier_wait(ring.full(), ring.phase);
    }
    t = ring.wait_tile();  // again, rather than kept in a register
    ring.release(lane);
    rows.softmax.template store<typename Config::Element>(a, QueryTile(t, tiles_per_head, warps), warp, lane);
  }
}

}  // namespace nsa::sm80::selected_forward
