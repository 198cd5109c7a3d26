// dK and dV of selected attention on Hopper: a CTA owns 64 keys of a block and gathers the query rows that chose it.
//   S^T = K Q^T   P^T = exp(S^T - lse)   dV = P^T dO   dP^T = V dO^T   dS^T = P^T (dP^T - delta)   dK = scale dS^T Q
// Sums stay in registers and are added in a fixed order: bitwise deterministic without atomics.
#pragma once

#include <cuda.h>

#include "device/key_item.cuh"
#include "device/warpgroup.cuh"
#include "sm90/selected_dkdv/config.h"

namespace nsa::sm90::selected_dkdv {

using cuda::BackwardArgs;
using device::Item;

// How query rows are loaded by TMA. box_heads: heads of a token in a box.
struct RowMaps {
  CUtensorMap q, dout;
  int box_heads;
};

// The stages' place in shared memory and the turn of one role. Where every stage is one warpgroup's, the first has the
// even ones and the second the odd ones, of 5 stages 3 and 2: a barrier that served both in turn would pass through
// phases that neither sees, and a parity can't tell a lap that is still to land from the next.
template <typename Config>
struct RowRing {
  static constexpr int kStep = Config::kWarpgroups / Config::kReaders;  // from a stage to the warpgroup's next
  uint32_t shared;
  int stages;
  int stage = 0;
  unsigned phase = 0;
  int other_stage = 1;  // the other warpgroup's, for producers
  unsigned other_phase = 0;

  __device__ __forceinline__ uint32_t full(int s) const { return shared + 16 * s; }
  __device__ __forceinline__ uint32_t empty(int s) const { return full(s) + 8; }
  __device__ __forceinline__ uint32_t data() const { return shared + Config::kStages + stage * Config::kStageBytes; }
  __device__ __forceinline__ void init() const {
    // by TMA every warp arrives with its boxes and each of its lanes with the statistics it copied
    const int arrivals = Config::kByThreads ? Config::kProducers : Config::kBoxWarps * 33;
    for (int s = 0; s < stages; ++s) {
      device::barrier_init(full(s), arrivals);
      device::barrier_init(empty(s), Config::kReaders * 4 * device::kWarpArrivals);
    }
    device::publish_barriers();
  }
  // By consumers, to the warpgroup's next stage.
  __device__ __forceinline__ void advance() {
    const int first = stage % kStep;
    stage += kStep;
    if (stage >= stages) {
      stage = first;
      phase ^= 1;
    }
  }
  // By producers, which serve the warpgroups in turn.
  __device__ __forceinline__ void take_turns() {
    advance();
    if constexpr (kStep == 2) {
      const int next = other_stage;
      const unsigned next_phase = other_phase;
      other_stage = stage;
      other_phase = phase;
      stage = next;
      phase = next_phase;
    }
  }
};

// A row of an item: the entry (token) that it belongs to and its head of the group, counted up without a division.
struct GroupRow {
  int entry, head;

  __device__ __forceinline__ GroupRow(int row, const cuda::Divisor& group)
      : entry(row / group), head(row - entry * group) {}
  // steps: GroupRow(rows, group)
  __device__ __forceinline__ void advance(const GroupRow& steps, const cuda::Divisor& group) {
    entry += steps.entry;
    head += steps.head;
    if (head >= group) {
      head -= group;
      ++entry;
    }
  }
  // The row's token; -1: the item has no such row.
  __device__ __forceinline__ int token(const BackwardArgs& a, const Item& item) const {
    return entry < item.entries ? __ldg(a.index.rows + item.begin + entry) : -1;
  }
};

// The item's keys, by kThreads threads; they are there when the first stage is.
template <typename Config, int kThreads>
__device__ __forceinline__ void copy_block(const BackwardArgs& a, const Item& item, uint32_t block, int thread) {
  const device::RowCopy<typename Config::KeyTileK, kThreads> copy_k(a.k.row_bytes, thread);
  const device::RowCopy<typename Config::KeyTileV, kThreads> copy_v(a.v.row_bytes, thread);
  copy_k.some(block, a.k.at(item.first_key, item.head), a.k.row_bytes, Config::kKeys, item.keys);
  copy_v.some(block + Config::kValues, a.v.at(item.first_key, item.head), a.v.row_bytes, Config::kKeys, item.keys);
}

// The producer warpgroup's whole work: the block, then stage after stage of rows. Eight threads copy 128 bytes of a
// row. Its token is read a stage ahead: from L2 it takes 600 to 800 cycles, as long as the copies of a stage.
template <typename Config>
__device__ __forceinline__ void produce(const BackwardArgs& a, const Item& item, RowRing<Config>& ring, int num_rows) {
  constexpr int kPasses = Config::kRows / 16;
  const int thread = threadIdx.x - Config::kConsumers, chunk = thread % 8;
  copy_block<Config, Config::kProducers>(a, item, ring.shared + Config::kBlock, thread);
  const int first_head = item.head * a.group, heads = a.num_heads_k * a.group;
  const char* const q_base = a.q.at(0, first_head) + 16 * chunk;
  const char* const dout_base = a.dout.at(0, first_head) + 16 * chunk;
  const uint32_t to_q = Config::RowTileQ::offset(thread / 8, chunk);
  const uint32_t to_dout = Config::kDout + Config::RowTileDout::offset(thread / 8, chunk);
  const GroupRow steps(16, a.group);
  GroupRow row(thread / 8, a.group), ahead = row;
  int tokens[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    tokens[pass] = ahead.token(a, item);
    ahead.advance(steps, a.group);
  }
  for (int first = 0; first < num_rows; first += Config::kRows) {
    device::barrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
    const uint32_t stage = ring.data();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool real = tokens[pass] >= 0;
      const int token = max(tokens[pass], 0);
      const char* q = q_base + (a.q.row_offset(token) + row.head * a.q.head_bytes);
      const char* dout = dout_base + (a.dout.row_offset(token) + row.head * a.dout.head_bytes);
#pragma unroll
      for (int c = 0; c < Config::kDk / 64; ++c) {
        device::copy16_async(stage + to_q + pass * 16 * Config::RowTileQ::kRowBytes + c * Config::RowTileQ::kBoxBytes,
                             q + 128 * c, real);
      }
#pragma unroll
      for (int c = 0; c < Config::kDv / 64; ++c) {
        device::copy16_async(
            stage + to_dout + pass * 16 * Config::RowTileDout::kRowBytes + c * Config::RowTileDout::kBoxBytes,
            dout + 128 * c, real);
      }
      const int r = 16 * pass + thread / 8;
      if (chunk == 0) {  // rows that don't exist become zeros everywhere, and so does what they add
        const cuda::RowStats* stats = a.stats + (static_cast<int64_t>(token) * heads + first_head + row.head);
        device::copy_row_stats(stage + Config::kLse + 4 * r, stage + Config::kDelta + 4 * r, stats, real);
      } else if (chunk == 1) {
        device::copy4_async(stage + Config::kLastKeys + 4 * r, a.plan.last_key + token, real);
      }
      row.advance(steps, a.group);
      tokens[pass] = ahead.token(a, item);
      ahead.advance(steps, a.group);
    }
    device::barrier_arrive_after_copies(ring.full(ring.stage));
    ring.take_turns();
  }
}

// The same with rows by TMA: a warp brings 16 rows of every stage. Its lanes know one row each, twice: lanes 0 .. 15
// copy the row's {lse2, delta}, lanes 16 .. 31 its last key. Tokens are read two stages ahead, since a stage costs a
// warp no more than a few hundred cycles.
template <typename Config>
__device__ __forceinline__ void produce_boxes(const BackwardArgs& a, const RowMaps& maps, const Item& item,
                                              RowRing<Config>& ring, int num_rows, int warp, int lane) {
  if (warp >= Config::kBoxWarps) return;
  copy_block<Config, 32 * Config::kBoxWarps>(a, item, ring.shared + Config::kBlock, 32 * warp + lane);
  const int first_head = item.head * a.group, heads = a.num_heads_k * a.group;
  const int r = 16 * warp + lane % 16;
  const GroupRow steps(Config::kRows, a.group);
  GroupRow row(r, a.group), ahead = row;
  int token = ahead.token(a, item);
  ahead.advance(steps, a.group);
  int next = ahead.token(a, item);
  for (int first = 0; first < num_rows; first += Config::kRows) {
    ahead.advance(steps, a.group);
    const int after_next = ahead.token(a, item);
    const bool real = token >= 0;
    const int from = max(token, 0), head = first_head + row.head;
    device::barrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
    const uint32_t stage = ring.data(), full = ring.full(ring.stage);
    if (lane == 0) device::barrier_arrive_expect(full, 16 * 2 * (Config::kDk + Config::kDv));
    const int box_head = real ? head : heads;  // a box past the last head is zeros
    for (int i = 0; i < 16; i += maps.box_heads) {
      const int box_token = __shfl_sync(device::kFullWarp, from, i);
      const int at_head = __shfl_sync(device::kFullWarp, box_head, i);
      if (lane == 0) {
        const uint32_t to = stage + (16 * warp + i) * Config::RowTileQ::kRowBytes;
        device::copy_queries<Config::kDk, Config::kRows>(to, &maps.q, full, a.q, box_token, at_head);
        device::copy_queries<Config::kDv, Config::kRows>(to + Config::kDout, &maps.dout, full, a.dout, box_token,
                                                         at_head);
      }
    }
    if (lane < 16) {  // rows that don't exist become zeros here too
      device::copy_row_stats(stage + Config::kLse + 4 * r, stage + Config::kDelta + 4 * r,
                             a.stats + (static_cast<int64_t>(from) * heads + head), real);
    } else {
      device::copy4_async(stage + Config::kLastKeys + 4 * r, a.plan.last_key + from, real);
    }
    device::barrier_arrive_after_copies(full);
    ring.take_turns();
    row.advance(steps, a.group);
    token = next;
    next = after_next;
  }
}

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// Where a lane leaves dS (BackwardArgs::ds) of the item's first row that it holds; null: not wanted.
template <typename Config>
__device__ __forceinline__ char* score_gradients(const BackwardArgs& a, const Item& item, int warp, int lane) {
  if (!a.ds || warp >= 4 * Config::kWarpgroups / Config::kSplit) return nullptr;  // both halves compute the same
  const cuda::InvertedIndex& index = a.index;
  const int64_t place = item.begin - index.list_begin(index.first_list()) + index.first_place();
  const int64_t row = place * a.group + item.first_in_block / 64 * a.ds_rows;
  return a.ds + 128 * (row + lane / 4) + 32 * (warp % 4) + 8 * (lane % 4);
}

// dS^T of a warp's 16 keys and the rows of a stage: 32 bytes a row, 8 from each of its four lanes. rows: that exist,
// from the lane's first on. Through shared memory and bulk copies it was no faster: what it takes is the L2, which
// writes at half the rate of reads.
template <int kRows>
__device__ __forceinline__ void store_score_gradients(char* to, const uint32_t (&ds)[kRows / 16][4], int rows) {
#pragma unroll
  for (int t = 0; t < kRows / 16; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint2 keys = {device::transpose_matrix(ds[t][2 * r]), device::transpose_matrix(ds[t][2 * r + 1])};
      if (16 * t + 8 * r < rows) __stcs(reinterpret_cast<uint2*>(to + (16 * t + 8 * r) * 128), keys);
    }
  }
}

// A warpgroup's stages. Its products run while it works on registers:
//   S | dP beside P | dS | dV and dK beside the wait for the next stage, and its S behind them
// dP starts when dV and dK are done: it takes the registers of their operands. dV beside dS would need 16 more than
// there are with (128, 128) (C7512); that time is the other warpgroup's.
template <typename Config>
__device__ __forceinline__ void attend(const BackwardArgs& a, char* to_ds, int first_key, int unmasked_from,
                                       RowRing<Config>& ring, int num_rows, int warp, int lane,
                                       device::KeySums<Config>& sums) {
  using Element = typename Config::Element;
  constexpr int kRows = Config::kRows, kStep = RowRing<Config>::kStep;
  const int warpgroup = warp / 4, half = Config::kSplit == 2 ? warpgroup : 0;
  const uint32_t block = ring.shared + Config::kBlock;
  const uint32_t dv_rows = Config::kDout + half * (Config::kDvColumns / 64) * Config::RowTileDout::kBoxBytes;
  const uint32_t dk_rows = half * (Config::kDkColumns / 64) * Config::RowTileQ::kBoxBytes;
  const int key = first_key + 16 * (warp % 4) + lane / 4;
  float p[kRows / 8][4], ds[kRows / 8][4];
  uint32_t p_operand[kRows / 16][4], ds_operand[kRows / 16][4];
  int last = -1;  // stage
  const int first = kStep == 2 ? warpgroup * kRows : 0;
  if (first >= num_rows)
    return;  // ptxas serialises the products where zeros of no loop meet their sums before the wait
  if (kStep == 2) ring.stage = warpgroup;
  for (int row = first; row < num_rows; row += kStep * kRows) {
    device::barrier_wait(ring.full(ring.stage), ring.phase);
    const uint32_t stage = ring.data(), delta = stage + Config::kDelta;
    device::fence_shared_for_wgmma();
    device::wgmma_fence();
    device::start_transposed<Element, Config::kDk, kRows>(p, block, stage);
    device::wgmma_commit();
    device::wgmma_wait<1>();
    if (last >= 0) device::arrive_for_warp(ring.empty(last), lane);  // the last stage of all isn't filled again
    device::wgmma_fence();
    device::start_transposed<Element, Config::kDv, kRows>(ds, block + Config::kValues, stage + Config::kDout);
    device::wgmma_commit();
    // rows ascend, and so do their last keys: when the first row sees the whole block, all do
    const bool masked = device::load_shared(stage + Config::kLastKeys) < unmasked_from;
    device::wgmma_wait<1>();
    device::hold(p);
    device::key_probabilities(p, stage + Config::kLse, delta, stage + Config::kLastKeys, key, masked, a.scale_log2,
                              lane);
    device::wgmma_wait<0>();
    device::hold(ds);
    device::key_gradients(p, ds, delta, lane);
    device::round_to_operand<Element, kRows>(p_operand, p);
    device::round_to_operand<Element, kRows>(ds_operand, ds);
    device::wgmma_fence();
    device::start_columns<Element, kRows, Config::kDvColumns>(sums.dv, p_operand, stage + dv_rows);
    device::start_columns<Element, kRows, Config::kDkColumns>(sums.dk, ds_operand, stage + dk_rows);
    device::wgmma_commit();
    if (to_ds) store_score_gradients<kRows>(to_ds + row * int64_t{128}, ds_operand, num_rows - row - lane / 4);
    last = ring.stage;
    ring.advance();
  }
  device::wgmma_wait<0>();
  device::hold(sums.dv);
  device::hold(sums.dk);
}

// unmasked_from: a row needs no mask that sees this key.
template <typename Config>
__device__ __forceinline__ void consume(const BackwardArgs& a, char* to_ds, int first_key, int unmasked_from,
                                        RowRing<Config>& ring, int num_rows, int warp, int lane) {
  const int warpgroup = warp / 4;
  device::KeySums<Config> sums;
  sums.reset();
  attend<Config>(a, to_ds, first_key, unmasked_from, ring, num_rows, warp, lane, sums);
  if constexpr (RowRing<Config>::kStep == 2) {
    const uint32_t at = ring.shared + Config::kBlock + (warp % 4) * Config::kSumBytes + 16 * lane;
    sync_consumers();
    if (warpgroup == 1) sums.leave(at);
    sync_consumers();
    if (warpgroup == 1) return;
    sums.add(at);
  }
  device::store_sums<Config>(a, device::fetch_item(ring.shared + Config::kItem), 16 * (warp % 4),
                             Config::kSplit == 2 ? warpgroup : 0, lane, sums);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    kernel(const __grid_constant__ BackwardArgs a, const __grid_constant__ RowMaps maps, int stages) {
  extern __shared__ __align__(1024) char shared_memory[];
  const int warp = __shfl_sync(device::kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Item item;
  if (!device::find_item<Config::kKeys>(a, item)) return;
  RowRing<Config> ring = {device::shared_address(shared_memory), stages};
  if (threadIdx.x == 0) {
    ring.init();
    device::leave_item(item, ring.shared + Config::kItem);
  }
  __syncthreads();
  const int num_rows = item.entries * a.group;
  if (warp >= Config::kConsumers / 32) {
    device::give_registers<Config::kProducerRegisters>();
    if (num_rows == 0) return;
    if constexpr (Config::kByThreads)
      produce<Config>(a, item, ring, num_rows);
    else
      produce_boxes<Config>(a, maps, item, ring, num_rows, warp - Config::kConsumers / 32, lane);
  } else {
    device::take_registers<Config::kConsumerRegisters>();
    const bool always =
        item.keys < Config::kKeys || (a.negative && *a.negative);  // a short block's other keys count in dS
    const int unmasked_from = always ? INT_MAX : item.first_key + item.keys - 1;
    consume<Config>(a, score_gradients<Config>(a, item, warp, lane), item.first_key, unmasked_from, ring, num_rows,
                    warp, lane);
  }
}

}  // namespace nsa::sm90::selected_dkdv
