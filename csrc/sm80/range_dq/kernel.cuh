// dQ of range attention: like the forward, a CTA of query rows walks the run of keys that they see.
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   dQ = scale dS K
#pragma once

#include "device/range_rows.cuh"
#include "device/range_stages.cuh"
#include "sm80/range_dq/config.h"

namespace nsa::sm80::range_dq {

using cuda::RangeBackwardArgs;

template <typename Config>
using Queries = device::RangeQueries<Config::kRows>;

template <typename Config>
struct Rows {
  device::RowOperand<Config::kDk, Config::kRowsInRegisters> q;
  device::RowOperand<Config::kDv, Config::kRowsInRegisters> dout;
  device::RangeVisibility sees;
  float lse2[2], delta[2];
  float dq[Config::kDk / 8][4];
};

template <typename Config>
__device__ __forceinline__ void load_rows(const RangeBackwardArgs& a, const Queries<Config>& tile, uint32_t own,
                                          int warp, int lane, Rows<Config>& rows) {
  rows.q.fetch(a.q, tile, a.group, own, warp, lane);
  rows.dout.fetch(a.dout, tile, a.group, own + Config::kDoutBytes, warp, lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto row = tile.row(16 * warp + lane / 4 + 8 * r, a.group);
    rows.sees.set_row(r, row.real, row.token, a.plan);
    const int64_t at = static_cast<int64_t>(row.token) * a.num_heads_k * a.group + row.head;
    const cuda::RowStats stats = row.real ? a.stats[at] : cuda::RowStats{INFINITY, 0.f};
    rows.lse2[r] = stats.lse2;
    rows.delta[r] = stats.delta;
  }
  device::clear(rows.dq);
}

// kStep keys in shared memory, from k row `key` on.
template <typename Config>
__device__ __forceinline__ void attend(Rows<Config>& rows, uint32_t keys, uint32_t values, int key, bool all,
                                       float scale_log2, int lane) {
  using Element = typename Config::Element;
  constexpr int kStep = Config::kStep;
  float s[kStep / 8][4], dp[kStep / 8][4];
  device::clear(s);
  device::clear(dp);
  device::multiply_transposed<Element, Config::kDk, kStep>(s, rows.q, keys, lane);
  device::multiply_transposed<Element, Config::kDv, kStep>(dp, rows.dout, values, lane);
#pragma unroll
  for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = device::exp2_approx(s[n][i] * scale_log2 - rows.lse2[i / 2]) * (dp[n][i] - rows.delta[i / 2]);
    }
  }
  if (!all || device::is_negative(rows.delta)) {
    rows.sees.stage = key;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = rows.sees.sees(i / 2, n, i % 2, lane) ? device::signed_by(rows.delta[i / 2], s[n][i]) : 0.f;
      }
    }
  }
  uint32_t ds[kStep / 16][4];
  device::round_to_operand<Element, kStep>(ds, s);
  device::multiply<Element, Config::kDk, kStep, Config::kDk>(rows.dq, ds, keys, lane);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ RangeBackwardArgs a, int tiles_per_head) {
  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t shared = device::shared_address(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Queries<Config> tile(a.plan, blockIdx.x, tiles_per_head, a.num_heads_k, a.group);
  if (!tile.real) return;
  Rows<Config> rows;
  const auto load = [&] {
    load_rows<Config>(a, tile, shared + Config::kRowsAt + warp * Config::kWarpBytes, warp, lane, rows);
  };
  device::for_key_stages<Config>(a.k, a.v, tile, shared, load, [&](uint32_t stage, int first_key) {
#pragma unroll 1
    for (int first = 0; first < Config::kKeys; first += Config::kStep) {
      const int key = first_key + first;
      attend<Config>(rows, stage + first * device::Tile<Config::kDk>::kRowBytes,
                     stage + Config::kKeyBytes + first * device::Tile<Config::kDv>::kRowBytes, key,
                     tile.all_see(key, Config::kStep), a.scale_log2, lane);
    }
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto row = tile.row(16 * warp + lane / 4 + 8 * r, a.group);
    char* to = row.real ? a.dq.at(row.token, row.head) : nullptr;
    device::store_row_wide<typename Config::Element, Config::kDk>(to, row.real, rows.dq, r, a.scale, lane,
                                                                  a.accumulate_dq);
  }
}

}  // namespace nsa::sm80::range_dq
