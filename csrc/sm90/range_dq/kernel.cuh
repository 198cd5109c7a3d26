// dQ of range attention on Hopper: persistent CTAs of query rows, keys and queries by TMA, products by wgmma.
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   dQ = scale dS K
#pragma once

#include "device/range_ring.cuh"
#include "sm90/range_dq/config.h"

namespace nsa::sm90::range_dq {

using cuda::RangeBackwardArgs;

struct Maps {
  CUtensorMap q, dout, k, v;
};

template <typename Config>
using Queries = device::RangeQueries<Config::kRows>;

template <typename Config>
using Shared = device::RangeRing<Config, 1>;

template <typename Config>
__device__ __forceinline__ void produce(const RangeBackwardArgs& a, const Maps& maps, Shared<Config>& shared,
                                        int tiles_per_head) {
  constexpr int kDk = Config::kDk, kDv = Config::kDv, kKeys = Config::kKeys;
  const auto load_rows = [&](int w, int token, int head) {
    device::copy_queries<kDk, 64>(shared.queries(w), &maps.q, shared.full_q(), a.q, token, head);
    device::copy_queries<kDv, 64>(shared.queries(w) + Config::kQueryBytes, &maps.dout, shared.full_q(), a.dout, token,
                                  head);
  };
  const auto load_stage = [&](int key, int head) {
    const int s = shared.stage;
    device::barrier_wait(shared.empty(s), shared.phase ^ 1);
    device::barrier_arrive_expect(shared.full(s), Config::kStageBytes);
    device::copy_keys<kDk, kKeys>(shared.keys(s), &maps.k, shared.full(s), a.k, key, head);
    device::copy_keys<kDv, kKeys>(shared.values(s), &maps.v, shared.full(s), a.v, key, head);
  };
  device::produce_range_tiles<Config>(a.plan, a.num_heads_k, a.group, shared, tiles_per_head, load_rows, load_stage);
}

// A lane's two rows. The k rows {first, end} that each sees lie in shared memory, 8 bytes a row: registers are short.
struct Rows {
  uint32_t seen;
  float lse2[2], delta[2];
};

// One tile, whose place lies at `info`. dQ of a stage runs while the next stage's scores are issued behind it.
template <typename Config>
__device__ __forceinline__ void attend(Shared<Config>& shared, uint32_t info, int first, int stages, const Rows& rows,
                                       float scale_log2, int warpgroup, int lane, float (&dq)[Config::kDk / 8][4]) {
  using Element = typename Config::Element;
  constexpr int kDk = Config::kDk, kDv = Config::kDv, kKeys = Config::kKeys;
  const uint32_t q = shared.queries(warpgroup), dout = q + Config::kQueryBytes;
  float s[kKeys / 8][4], dp[kKeys / 8][4];
  uint32_t ds[kKeys / 16][4];
  int last = 0;
  for (int i = 0; i < stages; ++i) {
    device::barrier_wait(shared.full(shared.stage), shared.phase);
    Queries<Config> tile;
    tile.fetch_keys(info);
    const int key = first + i * kKeys, valid = __shfl_sync(device::kFullWarp, tile.run_end, 0) - key;
    const bool all = __all_sync(device::kFullWarp, tile.all_see(key, kKeys) && !device::is_negative(rows.delta));
    if (valid < kKeys) {  // dS is 0 there, but 0 * NaN isn't
      device::clear_rows<kDk, kKeys>(shared.keys(shared.stage), valid, threadIdx.x % 128);
      device::publish_zeros(warpgroup);
    }
    device::wgmma_fence();
    device::start_transposed<Element, kDk, kKeys>(s, q, shared.keys(shared.stage));
    device::wgmma_commit();
    device::start_transposed<Element, kDv, kKeys>(dp, dout, shared.values(shared.stage));
    device::wgmma_commit();
    device::wgmma_wait<1>();
    device::hold(s);
    device::hold(dq);
    if (i > 0) device::arrive_for_warp(shared.empty(last), lane);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] = device::exp2_approx(s[n][j] * scale_log2 - rows.lse2[j / 2]);
    }
    device::wgmma_wait<0>();
    device::hold(dp);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] *= dp[n][j] - rows.delta[j / 2];
    }
    if (!all) {
      const device::RangeVisibility sees = {
          {device::load_shared_pair(rows.seen), device::load_shared_pair(rows.seen + 64)}, key, false};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[n][j] = sees.sees(j / 2, n, j % 2, lane) ? device::signed_by(rows.delta[j / 2], s[n][j]) : 0.f;
        }
      }
    }
    device::round_to_operand<Element, kKeys>(ds, s);
    device::hold(dq);
    device::wgmma_fence();
    device::start_columns<Element, kKeys, kDk>(dq, ds, shared.keys(shared.stage));
    device::wgmma_commit();
    last = shared.stage;
    shared.advance();
  }
  device::arrive_for_warp(shared.empty_q(), lane);
  device::wgmma_wait<0>();
  device::hold(dq);
  device::arrive_for_warp(shared.empty(last), lane);
}

template <typename Config>
__device__ __forceinline__ void consume(const RangeBackwardArgs& a, Shared<Config>& shared, int warp, int lane) {
  for (int nth = 0; device::wait_for_tile(shared, nth); ++nth) {
    const uint32_t info = shared.info(nth);
    Queries<Config> tile;
    tile.fetch_rows(info);
    Rows rows;
    rows.seen = shared.base + Config::kSeen + 8 * (16 * warp + lane / 4);
    __syncwarp();  // every lane is done with the last tile's
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto row = tile.row(16 * warp + lane / 4 + 8 * r, a.group);
      const int2 seen = row.real ? __ldg(a.plan.keys + row.token) : int2{0, 0};
      if (lane % 4 == 0) {
        device::store_shared(rows.seen + 64 * r, seen.x);
        device::store_shared(rows.seen + 64 * r + 4, seen.y);
      }
      const int64_t at = static_cast<int64_t>(row.token) * a.num_heads_k * a.group + row.head;
      const cuda::RowStats stats = row.real ? a.stats[at] : cuda::RowStats{INFINITY, 0.f};
      rows.lse2[r] = stats.lse2;
      rows.delta[r] = stats.delta;
    }
    __syncwarp();
    tile.fetch_keys(info);
    float dq[Config::kDk / 8][4];
    device::clear(dq);
    const int stages = __shfl_sync(device::kFullWarp, tile.num_stages(Config::kKeys), 0);
    if (stages > 0)
      attend<Config>(shared, info, tile.first, stages, rows, a.scale_log2, warp / 4, lane, dq);
    else
      device::arrive_for_warp(shared.empty_q(), lane);
    tile.fetch_rows(info);  // again, rather than kept in registers
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto row = tile.row(16 * warp + lane / 4 + 8 * r, a.group);
      char* to = row.real ? a.dq.at(row.token, row.head) : nullptr;
      device::store_row_wide<typename Config::Element, Config::kDk>(to, row.real, dq, r, a.scale, lane,
                                                                    a.accumulate_dq);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ RangeBackwardArgs a, const __grid_constant__ Maps maps, int tiles_per_head) {
  extern __shared__ __align__(1024) char shared_memory[];
  const int warp = __shfl_sync(device::kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Shared<Config> shared = {device::shared_address(shared_memory)};
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  if (warp >= Config::kConsumers / 32) {
    device::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x == Config::kConsumers) produce<Config>(a, maps, shared, tiles_per_head);
  } else {
    device::take_registers<Config::kConsumerRegisters>();
    consume<Config>(a, shared, warp, lane);
  }
}

}  // namespace nsa::sm90::range_dq
