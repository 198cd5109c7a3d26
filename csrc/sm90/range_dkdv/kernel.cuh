// dK and dV of range attention on Hopper: a CTA owns keys and takes a chunk of the run of query rows that see them.
//   S^T = K Q^T   P^T = exp(S^T - lse)   dV = P^T dO   dP^T = V dO^T   dS^T = P^T (dP^T - delta)   dK = scale dS^T Q
// Sums stay in registers and are added in a fixed order: bitwise deterministic without atomics.
#pragma once

#include "device/range_sums.cuh"
#include "device/range_tma.cuh"
#include "sm90/range_dkdv/config.h"

namespace nsa::sm90::range_dkdv {

using cuda::RangeBackwardArgs;

struct Maps {
  CUtensorMap q, dout, k, v;
};

template <typename Config>
using Item = device::RangeItem<Config::kKeys>;

template <typename Config>
struct Shared {
  uint32_t base;
  int stage = 0;
  unsigned phase = 0;

  __device__ __forceinline__ uint32_t full_block() const { return base; }
  __device__ __forceinline__ uint32_t full() const { return base + 16 + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int s) const { return base + 16 + 16 * s + 8; }
  __device__ __forceinline__ uint32_t seen(int key) const { return base + Config::kSeen + 8 * key; }
  __device__ __forceinline__ uint32_t block(int nth) const {
    return base + Config::kBlocks + nth * Config::kBlockBytes;
  }
  __device__ __forceinline__ uint32_t rows() const { return base + Config::kStagesAt + stage * Config::kStageBytes; }
  __device__ __forceinline__ void init() const {
    device::barrier_init(full_block(), 1);
    for (int s = 0; s < Config::kStages; ++s) {
      device::barrier_init(base + 16 + 16 * s, 33);  // boxes; the statistics that each lane copied
      device::barrier_init(empty(s), Config::kConsumers / 32 * device::kWarpArrivals);
    }
    device::publish_barriers();
  }
  __device__ __forceinline__ void advance() {
    if (++stage == Config::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The stage that an item begins with; it goes on to its last one and then from 0 to the one before. Tokens have their
// turn by their q row, modulo the item's length: so the items whose runs overlap, which run together, read a row at the
// same time. From first to last, each would read it the later the earlier its keys are: with a window of 512 at 64K
// tokens 3/4 of the reads missed the L2 and memory was 65 % busy, now 16 %; the kernel takes 5 % less.
template <int kRows>
__device__ __forceinline__ int first_stage(int begin, int group, int stages) {
  const int ahead = static_cast<unsigned>(begin) * group / kRows % stages;
  return ahead == 0 ? 0 : stages - ahead;
}

// The producer warp's whole work.
template <typename Config>
__device__ __forceinline__ void produce(const RangeBackwardArgs& a, const Maps& maps, const Item<Config>& item,
                                        Shared<Config>& shared, int rows, int lane) {
  constexpr int kRows = Config::kRows;
  if (lane == 0) {
    device::barrier_arrive_expect(shared.full_block(), Config::kKeys / 64 * Config::kBlockBytes);
    for (int b = 0; b < Config::kKeys / 64; ++b) {
      device::copy_keys<Config::kDk, 64>(shared.block(b), &maps.k, shared.full_block(), a.k, item.first_key + 64 * b,
                                         item.head);
      device::copy_keys<Config::kDv, 64>(shared.block(b) + Config::kKeyBytes, &maps.v, shared.full_block(), a.v,
                                         item.first_key + 64 * b, item.head);
    }
  }
  const int heads = a.num_heads_k * a.group, stages = (rows + kRows - 1) / kRows;
  int first = kRows * first_stage<kRows>(item.begin, a.group, stages);
  for (int i = 0; i < stages; ++i) {
    device::barrier_wait(shared.empty(shared.stage), shared.phase ^ 1);
    const uint32_t to = shared.rows();
    if (lane == 0) {
      device::barrier_arrive_expect(shared.full(), Config::kRowBytes);
      const int token = item.begin + first / a.group, head = item.head * a.group + first % a.group;
      device::copy_queries<Config::kDk, kRows>(to, &maps.q, shared.full(), a.q, token, head);
      device::copy_queries<Config::kDv, kRows>(to + Config::kDout, &maps.dout, shared.full(), a.dout, token, head);
    }
#pragma unroll
    for (int r = lane; r < kRows; r += 32) {
      const int row = first + r, step = row / a.group;
      const bool real = row < rows;  // zeros else
      const int64_t at =
          static_cast<int64_t>(item.begin + (real ? step : 0)) * heads + item.head * a.group + row - step * a.group;
      device::copy_row_stats(to + Config::kLse + 4 * r, to + Config::kDelta + 4 * r, a.stats + at, real);
    }
    device::barrier_arrive_after_copies(shared.full());
    shared.advance();
    first += kRows;
    if (first >= rows) first = 0;
  }
}

// The rows of an item that a warpgroup's keys concern: those that see any of them, and those that see all, which need
// no mask; with `mask_all` none of them.
struct KeyRows {
  int first, end, first_of_all, end_of_all;

  template <int kKeys>
  __device__ __forceinline__ KeyRows(const cuda::RangePlan& plan, const device::RangeItem<kKeys>& item, int first_key,
                                     const cuda::Divisor& group, bool mask_all) {
    const int keys = min(item.keys - first_key, 64);
    first = end = first_of_all = end_of_all = 0;
    if (keys <= 0) return;
    const int2 low = __ldg(plan.queries + item.first_key + first_key);
    const int2 high = __ldg(plan.queries + item.first_key + first_key + keys - 1);
    first = max(low.x - item.begin, 0) * group;
    end = min(high.y - item.begin, item.tokens) * group;
    first_of_all = max(high.x - item.begin, 0) * group;
    end_of_all = mask_all ? 0 : min(low.y - item.begin, item.tokens) * group;
  }
};

// The second warpgroup starts when the first has weighed a stage. Side by side they would ask for the tensor cores and
// work on registers at the same times: 15.3 ms became 14.3 (compressed, 64K tokens). It may wait before it gives a
// stage back, since what it waits for needs one stage at most: where the item's first one doesn't concern the first
// warpgroup, that doesn't keep the second waiting.
__device__ __forceinline__ void arrive_at_stagger() { asm volatile("bar.arrive 3, 256;" ::: "memory"); }
__device__ __forceinline__ void wait_for_stagger() { asm volatile("bar.sync 3, 256;" ::: "memory"); }

template <typename Config>
__device__ __forceinline__ void consume(const RangeBackwardArgs& a, Shared<Config>& shared, const KeyRows& seen,
                                        int item_begin, int rows, int warp, int lane, device::KeySums<Config>& sums) {
  using Element = typename Config::Element;
  constexpr int kRows = Config::kRows;
  const int warpgroup = warp / 4, nth = Config::kSplit == 2 ? 0 : warpgroup;
  const int half = Config::kSplit == 2 ? warpgroup : 0;
  const uint32_t block = shared.block(nth), sees_at = shared.seen(64 * nth + 16 * (warp % 4) + lane / 4);
  const int stages = (rows + kRows - 1) / kRows;
  const int begin = seen.first < seen.end ? seen.first / kRows : stages;
  const int end = seen.first < seen.end ? (seen.end + kRows - 1) / kRows : stages;
  const int start = rows > 0 ? first_stage<kRows>(item_begin, a.group, stages) : 0;
  auto skip = [&] {
    device::barrier_wait(shared.full(), shared.phase);
    device::arrive_for_warp(shared.empty(shared.stage), lane);
    shared.advance();
  };
  if (begin >= end) {  // apart: ptxas serialises the products where zeros of no loop meet their sums before the wait
    if (warpgroup == 0) arrive_at_stagger();
    if (warpgroup == 1) wait_for_stagger();
    for (int i = 0; i < stages; ++i) skip();
    return;
  }
  float p[kRows / 8][4], ds[kRows / 8][4];
  uint32_t p_operand[kRows / 16][4], ds_operand[kRows / 16][4];
  bool staggers = true;  // is still to arrive, or to wait
  if (warpgroup == 0 && (start < begin || start >= end)) {
    arrive_at_stagger();
    staggers = false;
  }
  device::barrier_wait(shared.full_block(), 0);
  for (int part = 0; part < 2; ++part) {  // [start, stages), [0, start)
    const int part_end = part == 0 ? stages : start;
    int i = part == 0 ? start : 0;
    for (; i < min(begin, part_end); ++i) skip();
    if (i < min(end, part_end) && warpgroup == 1 && staggers) {
      wait_for_stagger();
      staggers = false;
    }
    int last = -1;
    for (; i < min(end, part_end); ++i) {
      device::barrier_wait(shared.full(), shared.phase);
      const uint32_t stage = shared.rows();
      const int first = i * kRows;
      if (rows - first < kRows) {  // P and dS are 0 there, but 0 * NaN isn't
        device::clear_rows<Config::kDk, kRows>(stage, rows - first, threadIdx.x % 128);
        device::clear_rows<Config::kDv, kRows>(stage + Config::kDout, rows - first, threadIdx.x % 128);
        device::publish_zeros(warpgroup);
      }
      device::fence_shared_for_wgmma();
      device::wgmma_fence();
      device::start_transposed<Element, Config::kDk, kRows>(p, block, stage);
      device::wgmma_commit();
      device::start_transposed<Element, Config::kDv, kRows>(ds, block + Config::kKeyBytes, stage + Config::kDout);
      device::wgmma_commit();
      device::wgmma_wait<1>();
      device::hold(p);
      device::hold(sums.dk);
      if (last >= 0) device::arrive_for_warp(shared.empty(last), lane);
      const bool masked = first < seen.first_of_all || first + kRows > seen.end_of_all;
      device::RowVisibility sees = {};
      if (masked) sees.fetch(sees_at);
      device::range_probabilities(p, stage + Config::kLse, stage + Config::kDelta, first, sees, masked, a.scale_log2,
                                  lane);
      device::round_to_operand<Element, kRows>(p_operand, p);
      device::hold(sums.dv);
      device::wgmma_fence();
      device::start_columns<Element, kRows, Config::kDvColumns>(
          sums.dv, p_operand,
          stage + Config::kDout + half * (Config::kDvColumns / 64) * Config::RowTileDout::kBoxBytes);
      device::wgmma_commit();
      if (warpgroup == 0 && staggers) {
        arrive_at_stagger();
        staggers = false;
      }
      device::wgmma_wait<1>();  // dP; dV goes on
      device::hold(ds);
      if (masked) sees.fetch(sees_at);  // again, rather than kept in registers
      device::range_gradients(p, ds, stage + Config::kDelta, first, sees, masked, lane);
      device::round_to_operand<Element, kRows>(ds_operand, ds);
      device::hold(sums.dk);
      device::wgmma_fence();
      device::start_columns<Element, kRows, Config::kDkColumns>(
          sums.dk, ds_operand, stage + half * (Config::kDkColumns / 64) * Config::RowTileQ::kBoxBytes);
      device::wgmma_commit();
      // dK may go on under the next scores; (128, 128) lacks registers
      device::wgmma_wait<Config::kDk == 128 ? 0 : 1>();
      device::hold(sums.dv);
      last = shared.stage;
      shared.advance();
    }
    device::wgmma_wait<0>();
    device::hold(sums.dv);
    device::hold(sums.dk);
    if (last >= 0) device::arrive_for_warp(shared.empty(last), lane);
    for (; i < part_end; ++i) skip();
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ RangeBackwardArgs a, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared_memory[];
  const int warp = __shfl_sync(device::kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  // CTAs that run together take the same query rows against neighbouring keys
  const Item<Config> item(a.plan, blockIdx.z, blockIdx.x, blockIdx.y);
  if (!item.real) return;
  Shared<Config> shared = {device::shared_address(shared_memory)};
  if (threadIdx.x == 0) shared.init();
  if (threadIdx.x < Config::kKeys) {
    const int key = threadIdx.x;
    device::RowVisibility::leave(shared.seen(key), key < item.keys, item.first_key + key, item.begin, a.group, a.plan);
  }
  __syncthreads();
  const int rows = item.tokens * a.group;
  if (warp >= Config::kConsumers / 32) {
    device::give_registers<Config::kProducerRegisters>();
    if (warp == Config::kConsumers / 32 && rows > 0) produce<Config>(a, maps, item, shared, rows, lane);
  } else {
    device::take_registers<Config::kConsumerRegisters>();
    const int nth = Config::kSplit == 2 ? 0 : warp / 4, half = Config::kSplit == 2 ? warp / 4 : 0;
    device::KeySums<Config> sums;
    sums.reset();
    consume<Config>(a, shared, KeyRows(a.plan, item, 64 * nth, a.group, a.negative && *a.negative), item.begin, rows,
                    warp, lane, sums);
    // found again, rather than kept in registers
    device::store_range_sums<Config>(a, Item<Config>(a.plan, blockIdx.z, blockIdx.x, blockIdx.y),
                                     64 * nth + 16 * (warp % 4), half, lane, sums);
  }
}

}  // namespace nsa::sm90::range_dkdv
