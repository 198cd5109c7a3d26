// One work item of dK and dV: some keys of a block against some of the query rows that chose it. What the two families
// share.
#pragma once

#include "common/kernel_args.h"
#include "device/row_stats.cuh"
#include "device/tile.cuh"

namespace nsa::device {

// One CTA's part of the work: some keys of a block and entries of its list.
struct Item {
  int head;             // kv head
  int first_key, keys;  // k row; at most 64
  int first_in_block;   // key of the block, 0 or 64
  int64_t begin;        // entries, of index.rows
  int entries;
  int partial;  // partial tile, -1: the list is in one piece
};

// False: the CTA has none.
template <int kKeys>
__device__ __forceinline__ bool find_item(const cuda::BackwardArgs& a, Item& item) {
  // one latency, where a search for the item's list was six: 1 % of dK and dV at 64K tokens
  const cuda::WorkItem work = a.index.items[a.index.window * a.index.max_items + blockIdx.x];
  item.head = work.head;
  item.first_in_block = blockIdx.y * kKeys;
  item.first_key = work.first_key + item.first_in_block;
  item.keys = min(work.keys - item.first_in_block, kKeys);
  item.begin = work.begin;
  item.entries = work.entries;
  item.partial = work.partial;
  return item.keys > 0;
}

// The part of an item that store_sums() needs, through shared memory (16 bytes): registers are short in the loop
// between.
__device__ __forceinline__ void leave_item(const Item& item, uint32_t at) {
  store_shared(at, item.head);
  store_shared(at + 4, item.first_key);
  store_shared(at + 8, item.keys | item.first_in_block << 16);
  store_shared(at + 12, item.partial);
}
__device__ __forceinline__ Item fetch_item(uint32_t at) {
  const int keys = load_shared(at + 8);
  return {load_shared(at), load_shared(at + 4), keys & 0xffff, keys >> 16, 0, 0, load_shared(at + 12)};
}

template <typename Config>
struct KeySums {
  float dk[Config::kDkColumns / 8][4];
  float dv[Config::kDvColumns / 8][4];

  __device__ __forceinline__ void reset() {
    clear(dk);
    clear(dv);
  }
  // Leaves the sums in shared memory, 16 bytes a lane and 8 columns, or adds what was left there.
  __device__ __forceinline__ void leave(uint32_t at) const {
#pragma unroll
    for (int n = 0; n < Config::kDkColumns / 8; ++n) store_shared_float4(at + 512 * n, dk[n]);
#pragma unroll
    for (int n = 0; n < Config::kDvColumns / 8; ++n)
      store_shared_float4(at + 512 * (Config::kDkColumns / 8 + n), dv[n]);
  }
  __device__ __forceinline__ void add(uint32_t at) {
#pragma unroll
    for (int n = 0; n < Config::kDkColumns / 8; ++n) add(dk[n], at + 512 * n);
#pragma unroll
    for (int n = 0; n < Config::kDvColumns / 8; ++n) add(dv[n], at + 512 * (Config::kDkColumns / 8 + n));
  }

 private:
  static __device__ __forceinline__ void add(float (&sum)[4], uint32_t at) {
    const float4 other = load_shared_float4(at);
    sum[0] += other.x;
    sum[1] += other.y;
    sum[2] += other.z;
    sum[3] += other.w;
  }
};

// S^T -> P^T for 16 keys (this lane: key, key + 8) x 8 kColumns query rows, in place.
// lse2, delta, last_keys: of the first row, in shared memory, 4 bytes a row; the last two are read where masked: where
// not all is seen, or some gate is negative.
template <int kColumns>
__device__ __forceinline__ void key_probabilities(float (&p)[kColumns][4], uint32_t lse2, uint32_t delta,
                                                  uint32_t last_keys, int key, bool masked, float scale_log2,
                                                  int lane) {
  const int row = 2 * (lane & 3);
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const float2 two = load_shared_float2(lse2 + 4 * (8 * n + row));
#pragma unroll
    for (int i = 0; i < 4; ++i) p[n][i] = exp2_approx(p[n][i] * scale_log2 - (i % 2 ? two.y : two.x));
  }
  if (!masked) return;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const float2 two = load_shared_float2(delta + 4 * (8 * n + row));
    const int2 last = load_shared_pair(last_keys + 4 * (8 * n + row));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      p[n][i] = key + 8 * (i / 2) <= (i % 2 ? last.y : last.x) ? signed_by(i % 2 ? two.y : two.x, p[n][i]) : 0.f;
  }
}

// dP^T -> dS^T of the same, in place.
template <int kColumns>
__device__ __forceinline__ void key_gradients(const float (&p)[kColumns][4], float (&ds)[kColumns][4], uint32_t delta,
                                              int lane) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const float2 two = load_shared_float2(delta + 4 * (8 * n + 2 * (lane & 3)));
#pragma unroll
    for (int i = 0; i < 4; ++i) ds[n][i] = p[n][i] * (ds[n][i] - (i % 2 ? two.y : two.x));
  }
}

template <int kColumns>
__device__ __forceinline__ void store_partial(float* to, const float (&sum)[kColumns / 8][4], int r, int lane) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    *reinterpret_cast<float2*>(to + 8 * n + 2 * (lane & 3)) = {sum[n][2 * r], sum[n][2 * r + 1]};
  }
}

// To the sums of all windows. One item a window adds to a number, so that the order is that of the launches; nobody
// waits for the old value.
template <int kColumns>
__device__ __forceinline__ void add_to_sums(float* to, const float (&sum)[kColumns / 8][4], int r, int lane) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) add_to_global(to + 8 * n + 2 * (lane & 3), sum[n][2 * r], sum[n][2 * r + 1]);
}

// Writes a warp's 16 keys, from key `first` of the item on, and its columns: gradients, or a partial tile.
template <typename Config>
__device__ __forceinline__ void store_sums(const cuda::BackwardArgs& a, const Item& item, int first, int half, int lane,
                                           const KeySums<Config>& sums) {
  using Element = typename Config::Element;
  const int dk_column = half * Config::kDkColumns, dv_column = half * Config::kDvColumns;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = first + lane / 4 + 8 * r;
    if (key >= item.keys) continue;
    if (item.partial >= 0) {
      float* row = a.partials + (static_cast<int64_t>(item.partial) * a.plan.block_size + item.first_in_block + key) *
                                    (Config::kDk + Config::kDv);
      store_partial<Config::kDkColumns>(row + dk_column, sums.dk, r, lane);
      store_partial<Config::kDvColumns>(row + Config::kDk + dv_column, sums.dv, r, lane);
      continue;
    }
    const int k_row = item.first_key + key;
    if (a.sums) {
      float* row = a.sums + (static_cast<int64_t>(k_row) * a.num_heads_k + item.head) * (Config::kDk + Config::kDv);
      add_to_sums<Config::kDkColumns>(row + dk_column, sums.dk, r, lane);
      add_to_sums<Config::kDvColumns>(row + Config::kDk + dv_column, sums.dv, r, lane);
      continue;
    }
    if (a.dk.data) {
      store_row<Element, Config::kDkColumns>(a.dk.at(k_row, item.head) + 2 * dk_column, sums.dk, r, a.scale, lane);
    }
    if (a.dv.data) {
      store_row<Element, Config::kDvColumns>(a.dv.at(k_row, item.head) + 2 * dv_column, sums.dv, r, 1.f, lane);
    }
  }
}

}  // namespace nsa::device
