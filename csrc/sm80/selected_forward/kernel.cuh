// o and lse of selected attention: warps of 16 query rows over the ring of their tile's blocks (device/query_tile.cuh).
#pragma once

#include "sm80/selected_forward/config.h"

namespace nsa::sm80::selected_forward {

using cuda::ForwardArgs;
using device::KeyRing;
using device::kFullWarp;
using device::QueryTile;
using device::Unit;

inline constexpr float kLn2 = 0.6931471805599453f;
// A row's maximum is only followed when it grows by more than this (log2): P stays below 2^8, exact enough in 16 bits, and most
// blocks don't touch O.
inline constexpr float kRescaleThreshold = 8.f;

template <typename Config>
struct Rows {
  device::RegisterOperand<Config::kDk> q;
  float o[Config::kDv / 8][4];
  float max2[2];  // of the scores * log2(e), as used
  float sum[2];   // this lane's share
};

template <typename Config>
__device__ __forceinline__ void load_rows(const ForwardArgs& a, const QueryTile& tile, int warp, int lane,
                                          const device::Visibility<Config>& sees, Rows<Config>& rows) {
  const char* q[2];
  const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
  const int first_token = Unit(a.plan.units, tile.first_unit, a.group).first_token;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
    sees.set_row(r, row, first_token, a.plan);
    q[r] = row.real ? a.q.at(row.token, row.head) + 4 * (lane & 3) : nullptr;
    rows.max2[r] = -INFINITY;
    rows.sum[r] = 0.f;
  }
#pragma unroll
  for (int step = 0; step < Config::kDk / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* from = q[i & 1];
      rows.q.fragments[step][i] = from ? __ldg(reinterpret_cast<const unsigned*>(from + 32 * step + 16 * (i >> 1))) : 0;
    }
  }
  device::clear(rows.o);
}

// Scores -> exp2(scores - max2), following the maximum; O is rescaled when it moved.
template <typename Config>
__device__ __forceinline__ void softmax(Rows<Config>& rows, float (&s)[Config::kKeys / 8][4], float scale_log2) {
  float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < Config::kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) highest[i / 2] = fmaxf(highest[i / 2], s[n][i]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    highest[r] = fmaxf(highest[r], __shfl_xor_sync(kFullWarp, highest[r], 1));
    highest[r] = fmaxf(highest[r], __shfl_xor_sync(kFullWarp, highest[r], 2)) * scale_log2;
  }
  if (__any_sync(kFullWarp, highest[0] > rows.max2[0] + kRescaleThreshold || highest[1] > rows.max2[1] + kRescaleThreshold)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float moved = fmaxf(rows.max2[r], highest[r]);
      const float factor = moved == -INFINITY ? 1.f : device::exp2_approx(rows.max2[r] - moved);
      rows.max2[r] = moved;
      rows.sum[r] *= factor;
#pragma unroll
      for (int n = 0; n < Config::kDv / 8; ++n) {
        rows.o[n][2 * r] *= factor;
        rows.o[n][2 * r + 1] *= factor;
      }
    }
  }
  const float base[2] = {rows.max2[0] == -INFINITY ? 0.f : rows.max2[0], rows.max2[1] == -INFINITY ? 0.f : rows.max2[1]};
#pragma unroll
  for (int n = 0; n < Config::kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = device::exp2_approx(s[n][i] * scale_log2 - base[i / 2]);
      rows.sum[i / 2] += s[n][i];
    }
  }
}

// One stage of keys.
template <typename Config>
__device__ __forceinline__ void attend(Rows<Config>& rows, const KeyRing<Config>& ring,
                                       const device::Visibility<Config>& sees, float scale_log2, int lane) {
  float s[Config::kKeys / 8][4];
  device::clear(s);
  device::multiply_transposed<typename Config::Element, Config::kDk, Config::kKeys>(s, rows.q, ring.keys(), lane);
  if (!(scale_log2 > 0.f)) {  // the maximum of the scaled scores isn't the scaled maximum: scale first
#pragma unroll
    for (int n = 0; n < Config::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= scale_log2;
    }
    scale_log2 = 1.f;
  }
  if (!sees.everything()) {
#pragma unroll
    for (int n = 0; n < Config::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!sees.sees(i / 2, n, i % 2, lane)) s[n][i] = -INFINITY;
      }
    }
  }
  softmax(rows, s, scale_log2);
  uint32_t p[Config::kKeys / 16][4];
  device::round_to_operand<typename Config::Element, Config::kKeys>(p, s);
  device::multiply<typename Config::Element, Config::kDv, Config::kKeys, Config::kDv>(rows.o, p, ring.values(), lane);
}

template <typename Config>
__device__ __forceinline__ void store_rows(const ForwardArgs& a, const QueryTile& tile, int warp, int lane,
                                           const Rows<Config>& rows) {
  const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
    float sum = rows.sum[r];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    if (!row.real) continue;
    device::store_row<typename Config::Element, Config::kDv>(a.o.at(row.token, row.head), rows.o, r,
                                                             sum == 0.f ? 0.f : 1.f / sum, lane);
    if (a.lse.data && (lane & 3) == 0) {
      *reinterpret_cast<float*>(a.lse.at(row.token, row.head)) =
          sum == 0.f ? -INFINITY : rows.max2[r] * kLn2 + logf(sum);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) kernel(const __grid_constant__ ForwardArgs a, int stages, int warps,
                                                              int tiles_per_head) {
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  KeyRing<Config> ring(shared, stages);
  if (threadIdx.x == 0) ring.init(warps);
  __syncthreads();

  if (warp >= warps) {
    device::produce_tiles<Config>(a.plan, a.k, a.v, a.num_heads_k, a.group, warps, tiles_per_head, ring, warp - warps, lane);
    return;
  }
  device::Visibility<Config> sees(ring, warp, lane);
  for (int t = ring.wait_tile(); t >= 0; t = ring.wait_tile()) {
    Rows<Config> rows;
    load_rows<Config>(a, QueryTile(t, tiles_per_head, warps), warp, lane, sees, rows);
    while (true) {
      if (sees.read(ring, a.plan.block_size)) attend<Config>(rows, ring, sees, a.scale_log2, lane);
      if (ring.is_last()) break;
      ring.release(lane);
      device::barrier_wait(ring.full(), ring.phase);
    }
    t = ring.wait_tile();  // again, rather than kept in a register
    ring.release(lane);
    store_rows<Config>(a, QueryTile(t, tiles_per_head, warps), warp, lane, rows);
  }
}

}  // namespace nsa::sm80::selected_forward
