// o and lse of range attention on Hopper: persistent CTAs of 128 query rows, keys and queries by TMA, products by
// wgmma.
//
// Each warpgroup issues the scores of the next stage, then P V of this one, and computes the next P while the latter
// runs; the two warpgroups take turns at issuing, so that one computes P while the other's products run.
#pragma once

#include "device/range_output.cuh"
#include "device/range_ring.cuh"
#include "sm90/range_forward/config.h"

namespace nsa::sm90::range_forward {

using cuda::RangeForwardArgs;

struct Maps {
  CUtensorMap q, k, v;
};

template <typename Config>
using Queries = device::RangeQueries<Config::kRows>;

template <typename Config>
using Shared = device::RangeRing<Config, 2>;
constexpr int kK = 0, kV = 1;  // parts of a stage

template <typename Config>
__device__ __forceinline__ void produce(const RangeForwardArgs& a, const Maps& maps, Shared<Config>& shared,
                                        int tiles_per_head) {
  constexpr int kDk = Config::kDk, kDv = Config::kDv, kKeys = Config::kKeys;
  const auto load_rows = [&](int w, int token, int head) {
    device::copy_queries<kDk, 64>(shared.queries(w), &maps.q, shared.full_q(), a.q, token, head);
  };
  const auto load_stage = [&](int key, int head) {
    const int s = shared.stage;
    device::barrier_wait(shared.empty(s, kK), shared.phase ^ 1);
    device::barrier_arrive_expect(shared.full(s, kK), Config::kKeyBytes);
    device::copy_keys<kDk, kKeys>(shared.keys(s), &maps.k, shared.full(s, kK), a.k, key, head);
    device::barrier_wait(shared.empty(s, kV), shared.phase ^ 1);
    device::barrier_arrive_expect(shared.full(s, kV), Config::kValueBytes);
    device::copy_keys<kDv, kKeys>(shared.values(s), &maps.v, shared.full(s, kV), a.v, key, head);
  };
  device::produce_range_tiles<Config>(a.plan, a.num_heads_k, a.group, shared, tiles_per_head, load_rows, load_stage);
}

// The warpgroups' turns at issuing products. Barriers 1 .. are sync_warpgroup's.
struct Turn {
  int warpgroup;
  __device__ __forceinline__ void wait() const { asm volatile("bar.sync %0, 256;" ::"r"(4 + warpgroup) : "memory"); }
  __device__ __forceinline__ void pass() const {
    asm volatile("bar.arrive %0, 256;" ::"r"(4 + (warpgroup ^ 1)) : "memory");
  }
};

// One tile with at least one stage, up to the sums of its rows.
template <typename Config>
__device__ __forceinline__ void attend(Shared<Config>& shared, const Queries<Config>& tile, int stages,
                                       device::RangeVisibility& sees, float scale_log2, int warpgroup, int lane,
                                       device::OnlineSoftmax<Config::kDv>& softmax) {
  using Element = typename Config::Element;
  constexpr int kDk = Config::kDk, kDv = Config::kDv, kKeys = Config::kKeys;
  const uint32_t q = shared.queries(warpgroup);
  const Turn turn = {warpgroup};
  float s[kKeys / 8][4], factor[2];
  uint32_t p[kKeys / 16][4];
  auto look = [&](int i) {
    sees.stage = tile.first + i * kKeys;
    sees.all = tile.all_see(sees.stage, kKeys);
  };
  device::barrier_wait(shared.full(shared.stage, kK), shared.phase);
  turn.wait();
  device::wgmma_fence();
  device::start_transposed<Element, kDk, kKeys>(s, q, shared.keys(shared.stage));
  device::wgmma_commit();
  turn.pass();
  device::wgmma_wait<0>();
  device::hold(s);
  device::arrive_for_warp(shared.empty(shared.stage, kK), lane);
  look(0);
  float scale = scale_log2;
  softmax.follow_maximum(s, factor, sees, scale, lane);  // O is still 0
  softmax.exponentiate(s, scale);
  device::round_to_operand<Element, kKeys>(p, s);
  for (int i = 1; i < stages; ++i) {
    const int last = shared.stage;
    const unsigned last_phase = shared.phase;
    shared.advance();
    device::barrier_wait(shared.full(shared.stage, kK), shared.phase);
    turn.wait();
    device::wgmma_fence();
    device::start_transposed<Element, kDk, kKeys>(s, q, shared.keys(shared.stage));
    device::wgmma_commit();
    device::barrier_wait(shared.full(last, kV), last_phase);
    device::hold(softmax.o);
    device::wgmma_fence();
    device::start_columns<Element, kKeys, kDv>(softmax.o, p, shared.values(last));
    device::wgmma_commit();
    turn.pass();
    device::wgmma_wait<1>();
    device::hold(s);
    device::arrive_for_warp(shared.empty(shared.stage, kK), lane);
    look(i);
    scale = scale_log2;
    const bool moved = softmax.follow_maximum(s, factor, sees, scale, lane);
    softmax.exponentiate(s, scale);
    device::wgmma_wait<0>();
    device::hold(softmax.o);
    device::arrive_for_warp(shared.empty(last, kV), lane);
    if (moved) softmax.rescale(factor);
    device::round_to_operand<Element, kKeys>(p, s);
  }
  device::arrive_for_warp(shared.empty_q(), lane);
  device::barrier_wait(shared.full(shared.stage, kV), shared.phase);
  const int valid = tile.run_end - (tile.first + (stages - 1) * kKeys);
  if (valid < kKeys) {  // P is 0 there, but 0 * NaN isn't
    device::clear_rows<kDv, kKeys>(shared.values(shared.stage), valid, threadIdx.x % 128);
    device::publish_zeros(warpgroup);
  }
  device::hold(softmax.o);
  device::wgmma_fence();
  device::start_columns<Element, kKeys, kDv>(softmax.o, p, shared.values(shared.stage));
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::hold(softmax.o);
  device::arrive_for_warp(shared.empty(shared.stage, kV), lane);
  shared.advance();
}

template <typename Config>
__device__ __forceinline__ void consume(const RangeForwardArgs& a, Shared<Config>& shared, int warp, int lane) {
  const int warpgroup = warp / 4;
  if (warpgroup == 1) Turn{1}.pass();  // the first turn is warpgroup 0's
  for (int nth = 0; device::wait_for_tile(shared, nth); ++nth) {
    const uint32_t info = shared.info(nth);
    Queries<Config> tile;
    tile.fetch_rows(info);
    device::RangeVisibility sees;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto row = tile.row(16 * warp + lane / 4 + 8 * r, a.group);
      sees.set_row(r, row.real, row.token, a.plan);
    }
    tile.fetch_keys(info);
    device::OnlineSoftmax<Config::kDv> softmax;
    softmax.reset();
    const int stages = __shfl_sync(device::kFullWarp, tile.num_stages(Config::kKeys), 0);
    if (stages > 0)
      attend<Config>(shared, tile, stages, sees, a.scale_log2, warpgroup, lane, softmax);
    else
      device::arrive_for_warp(shared.empty_q(), lane);
    tile.fetch_rows(info);  // again, rather than kept in registers
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto row = tile.row(16 * warp + lane / 4 + 8 * r, a.group);
      device::store_output<typename Config::Element>(a, softmax, r, row.real, row.token, row.head, lane);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ RangeForwardArgs a, const __grid_constant__ Maps maps, int tiles_per_head) {
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

}  // namespace nsa::sm90::range_forward
