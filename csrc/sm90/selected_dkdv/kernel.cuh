// dK and dV of selected attention on Hopper: a CTA owns 64 keys of a block and gathers the query rows that chose it.
//   S^T = K Q^T   P^T = exp(S^T - lse)   dV = P^T dO   dP^T = V dO^T   dS^T = P^T (dP^T - delta)   dK = scale dS^T Q
// Sums stay in registers and are added in a fixed order: bitwise deterministic without atomics.
#pragma once

#include "device/key_item.cuh"
#include "device/warpgroup.cuh"
#include "sm90/selected_dkdv/config.h"

namespace nsa::sm90::selected_dkdv {

using cuda::BackwardArgs;
using device::Item;

// The stages' place in shared memory and the turn of one role.
template <typename Config>
struct RowRing {
  uint32_t shared;
  int stages;
  int stage = 0;
  unsigned phase = 0;

  __device__ __forceinline__ uint32_t full(int s) const { return shared + 16 * s; }
  __device__ __forceinline__ uint32_t empty(int s) const { return full(s) + 8; }
  __device__ __forceinline__ uint32_t data() const { return shared + Config::kStages + stage * Config::kStageBytes; }
  __device__ __forceinline__ void init() const {
    for (int s = 0; s < stages; ++s) {
      device::barrier_init(full(s), Config::kProducers);
      device::barrier_init(empty(s), Config::kConsumers / 32);
    }
  }
  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// One query row of a stage, as the producers see it.
struct GatheredRow {
  bool real;
  int token, head;

  __device__ __forceinline__ GatheredRow(const int32_t* tokens, int row, int num_rows, int kv_head, int group) {
    real = row < num_rows;
    const int entry = row / group;
    token = real ? __ldg(tokens + entry) : 0;
    head = kv_head * group + row - entry * group;
  }
};

// The producer warpgroup's whole work: the block, then stage after stage of rows. Eight threads copy 128 bytes of a
// row.
template <typename Config>
__device__ __forceinline__ void produce(const BackwardArgs& a, const Item& item, RowRing<Config>& ring, int num_rows) {
  const int thread = threadIdx.x - Config::kConsumers;
  const device::RowCopy<typename Config::KeyTileK, Config::kProducers> copy_k(a.k.row_bytes, thread);
  const device::RowCopy<typename Config::KeyTileV, Config::kProducers> copy_v(a.v.row_bytes, thread);
  copy_k.some(ring.shared + Config::kBlock, a.k.at(item.first_key, item.head), a.k.row_bytes, Config::kKeys, item.keys);
  copy_v.some(ring.shared + Config::kBlock + Config::kValues, a.v.at(item.first_key, item.head), a.v.row_bytes,
              Config::kKeys, item.keys);
  const int32_t* tokens = a.index.rows + item.begin;
  const int heads = a.num_heads_k * a.group;
  const int chunk = thread % 8;
  for (int first = 0; first < num_rows; first += Config::kRows) {
    device::barrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
    const uint32_t stage = ring.data();
#pragma unroll
    for (int pass = 0; pass < Config::kRows / 16; ++pass) {
      const int r = 16 * pass + thread / 8;
      const GatheredRow row(tokens, first + r, num_rows, item.head, a.group);
      const char* q = a.q.at(row.token, row.head) + 16 * chunk;
      const char* dout = a.dout.at(row.token, row.head) + 16 * chunk;
#pragma unroll
      for (int c = 0; c < Config::kDk / 64; ++c) {
        device::copy16_async(stage + Config::RowTileQ::offset(r, chunk) + c * Config::RowTileQ::kBoxBytes, q + 128 * c,
                             row.real);
      }
#pragma unroll
      for (int c = 0; c < Config::kDv / 64; ++c) {
        device::copy16_async(
            stage + Config::kDout + Config::RowTileDout::offset(r, chunk) + c * Config::RowTileDout::kBoxBytes,
            dout + 128 * c, row.real);
      }
      if (chunk == 0) {  // rows that don't exist become zeros everywhere, and so does what they add
        const cuda::RowStats* stats = a.stats + static_cast<int64_t>(row.token) * heads + row.head;
        device::copy_small_async<8>(stage + Config::kStats + 8 * r, stats, row.real);
        device::copy_small_async<4>(stage + Config::kLastKeys + 4 * r, a.plan.last_key + row.token, row.real);
      }
    }
    device::barrier_arrive_after_copies(ring.full(ring.stage));
    ring.advance();
  }
}

// One stage of query rows, by one warpgroup.
template <typename Config>
__device__ __forceinline__ void attend(const BackwardArgs& a, uint32_t block, uint32_t stage, int key, bool masked,
                                       int half, int lane, device::KeySums<Config>& sums) {
  using Element = typename Config::Element;
  constexpr int kRows = Config::kRows;
  float p[kRows / 8][4], ds[kRows / 8][4];
  device::fence_shared_for_wgmma();
  device::wgmma_fence();
  device::start_transposed<Element, Config::kDk, kRows>(p, block, stage);
  device::start_transposed<Element, Config::kDv, kRows>(ds, block + Config::kValues, stage + Config::kDout);
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::hold(p);
  device::hold(ds);
  device::key_probabilities(p, ds, stage + Config::kStats, stage + Config::kLastKeys, key, masked, a.scale_log2, lane);
  uint32_t p_operand[kRows / 16][4], ds_operand[kRows / 16][4];
  device::round_to_operand<Element, kRows>(p_operand, p);
  device::round_to_operand<Element, kRows>(ds_operand, ds);
  device::hold(sums.dv);
  device::hold(sums.dk);
  device::wgmma_fence();
  device::start_columns<Element, kRows, Config::kDvColumns>(
      sums.dv, p_operand, stage + Config::kDout + half * (Config::kDvColumns / 64) * Config::RowTileDout::kBoxBytes);
  device::start_columns<Element, kRows, Config::kDkColumns>(
      sums.dk, ds_operand, stage + half * (Config::kDkColumns / 64) * Config::RowTileQ::kBoxBytes);
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::hold(sums.dv);
  device::hold(sums.dk);
}

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// unmasked_from: a row needs no mask that sees this key.
template <typename Config>
__device__ __forceinline__ void consume(const BackwardArgs& a, int first_key, int unmasked_from, RowRing<Config>& ring,
                                        int num_rows, int warp, int lane) {
  const int warpgroup = warp / 4;
  const int half = Config::kSplit == 2 ? warpgroup : 0;
  const uint32_t block = ring.shared + Config::kBlock;
  const int first = 16 * (warp % 4);  // key of the item
  device::KeySums<Config> sums;
  sums.reset();
  int turn = 0;
  for (int row = 0; row < num_rows; row += Config::kRows) {
    device::barrier_wait(ring.full(ring.stage), ring.phase);
    if (Config::kSplit == 2 || turn == warpgroup) {
      // rows ascend, and so do their last keys: when the first row sees the whole block, all do
      const bool masked = device::load_shared(ring.data() + Config::kLastKeys) < unmasked_from;
      attend<Config>(a, block, ring.data(), first_key + first + lane / 4, masked, half, lane, sums);
    }
    turn ^= 1;
    __syncwarp();
    if (lane == 0) device::barrier_arrive(ring.empty(ring.stage));
    ring.advance();
  }
  if constexpr (Config::kSplit == 1) {
    const uint32_t at = block + (warp % 4) * Config::kSumBytes + 16 * lane;
    sync_consumers();
    if (warpgroup == 1) sums.leave(at);
    sync_consumers();
    if (warpgroup == 1) return;
    sums.add(at);
  }
  device::store_sums<Config>(a, device::fetch_item(ring.shared + Config::kItem), first, half, lane, sums);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) kernel(const __grid_constant__ BackwardArgs a, int stages) {
  extern __shared__ __align__(1024) char shared_memory[];
  const int warp = __shfl_sync(device::kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Item item;
  if (!device::find_item<Config::kKeys>(a, lane, item)) return;
  RowRing<Config> ring = {device::shared_address(shared_memory), stages};
  if (threadIdx.x == 0) {
    ring.init();
    device::leave_item(item, ring.shared + Config::kItem);
  }
  __syncthreads();
  const int num_rows = item.entries * a.group;
  if (warp >= Config::kConsumers / 32) {
    device::give_registers<Config::kProducerRegisters>();
    if (num_rows > 0) produce<Config>(a, item, ring, num_rows);
  } else {
    device::take_registers<Config::kConsumerRegisters>();
    const int unmasked_from = a.negative && *a.negative ? INT_MAX : item.first_key + item.keys - 1;
    consume<Config>(a, item.first_key, unmasked_from, ring, num_rows, warp, lane);
  }
}

}  // namespace nsa::sm90::selected_dkdv
