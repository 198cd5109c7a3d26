// o and lse of range attention: a CTA of query rows walks the run of keys that they see.
#pragma once

#include "device/range_output.cuh"
#include "device/range_rows.cuh"
#include "device/range_stages.cuh"
#include "sm80/range_forward/config.h"

namespace nsa::sm80::range_forward {

using cuda::RangeForwardArgs;

template <typename Config>
using Queries = device::RangeQueries<Config::kRows>;

template <typename Config>
struct Rows {
  device::RowOperand<Config::kDk, Config::kRowsInRegisters> q;
  device::OnlineSoftmax<Config::kDv> softmax;
  device::RangeVisibility sees;
};

template <typename Config>
__device__ __forceinline__ void load_rows(const RangeForwardArgs& a, const Queries<Config>& tile, uint32_t own,
                                          int warp, int lane, Rows<Config>& rows) {
  rows.q.fetch(a.q, tile, a.group, own, warp, lane);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto row = tile.row(16 * warp + lane / 4 + 8 * r, a.group);
    rows.sees.set_row(r, row.real, row.token, a.plan);
  }
  rows.softmax.reset();
}

// One stage of keys, from k row `key` on.
template <typename Config>
__device__ __forceinline__ void attend(Rows<Config>& rows, uint32_t stage, int key, bool all, float scale_log2,
                                       int lane) {
  using Element = typename Config::Element;
  float s[Config::kKeys / 8][4];
  device::clear(s);
  device::multiply_transposed<Element, Config::kDk, Config::kKeys>(s, rows.q, stage, lane);
  rows.sees.stage = key;
  rows.sees.all = all;
  float factor[2];
  if (rows.softmax.follow_maximum(s, factor, rows.sees, scale_log2, lane)) rows.softmax.rescale(factor);
  rows.softmax.exponentiate(s, scale_log2);
  uint32_t p[Config::kKeys / 16][4];
  device::round_to_operand<Element, Config::kKeys>(p, s);
  device::multiply<Element, Config::kDv, Config::kKeys, Config::kDv>(rows.softmax.o, p, stage + Config::kKeyBytes,
                                                                     lane);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ RangeForwardArgs a, int tiles_per_head) {
  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t shared = device::shared_address(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Queries<Config> tile(a.plan, blockIdx.x, tiles_per_head, a.num_heads_k, a.group);
  if (!tile.real) return;
  Rows<Config> rows;
  const auto load = [&] {
    load_rows<Config>(a, tile, shared + Config::kRowsAt + warp * Config::kWarpBytes, warp, lane, rows);
  };
  device::for_key_stages<Config>(a.k, a.v, tile, shared, load, [&](uint32_t stage, int key) {
    attend<Config>(rows, stage, key, tile.all_see(key, Config::kKeys), a.scale_log2, lane);
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto row = tile.row(16 * warp + lane / 4 + 8 * r, a.group);
    device::store_output<typename Config::Element>(a, rows.softmax, r, row.real, row.token, row.head, lane);
  }
}

}  // namespace nsa::sm80::range_forward
