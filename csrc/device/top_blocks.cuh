// The running list of a token's best blocks, and the token's answer at the end. A warp works on one token at a time.
//
// Blocks come in ascending order, so a block that ties with the list's last entry never enters, and ties inside the
// list stand in order of id without a comparison of ids.
#pragma once

#include "device/selection_tile.cuh"

namespace nsa::device {

// Where a group's tokens have their states, lists and open sums.
struct TokenTable {
  uint32_t states;  // shared memory
  char* lists;      // shared memory or workspace
  int token_bytes, topk;

  // Of group `nth` of the CTA's `groups`. shared_lists: unless the lists lie in the workspace.
  __device__ __forceinline__ void place(const cuda::SelectionArgs& a, uint32_t states_at, char* shared_lists,
                                        int groups, int nth) {
    states = states_at;
    lists = shared_lists;
    token_bytes = a.token_bytes;
    topk = a.topk;
    if (a.lists) {
      const int64_t group = blockIdx.x * groups + nth;
      lists = a.lists + group * a.tokens_per_group * a.token_bytes;
    }
  }
  __device__ __forceinline__ uint32_t state(int token) const { return states + 32 * token; }
  __device__ __forceinline__ float* scores(int token) const {  // [topk], descending
    return reinterpret_cast<float*>(lists + static_cast<int64_t>(token) * token_bytes);
  }
  __device__ __forceinline__ int* ids(int token) const { return reinterpret_cast<int*>(scores(token) + topk); }
  __device__ __forceinline__ float* open(int token) const { return scores(token) + 2 * topk; }  // [open_blocks]

  __device__ __forceinline__ void set(int token, const TokenState& s) const {
    const uint32_t to = state(token);
    store_shared(to, __float_as_int(s.threshold));
    store_shared(to + 4, s.scan_end);
    store_shared(to + 8, s.local_first);
    store_shared(to + 12, s.local_end);
    store_shared(to + 16, s.count);
    store_shared(to + 20, s.rest);
    store_shared(to + 24, s.keys);
    store_shared(to + 28, s.candidates);
  }
};

// Puts the lanes of `entering`, each with a block, into the token's list. Lanes stand in order of block.
__device__ __forceinline__ void enter_blocks(const TokenTable& table, int token, unsigned entering, float score,
                                             int block, int lane) {
  const int2 held = load_shared_pair(table.state(token) + 16);
  const int count = held.x, rest = held.y;
  float* const scores = table.scores(token);
  int* const ids = table.ids(token);
  int place = 0;  // of this lane's block in the new list
  for (unsigned bits = entering; bits; bits &= bits - 1) {
    const int other = __ffs(bits) - 1;
    const float s = __shfl_sync(kFullWarp, score, other);
    place += s > score || (s == score && other < lane);
  }
  // From the list's end to its beginning: entries only move back.
  for (int first = (count - 1) & ~31; first >= 0; first -= 32) {
    const int entry = first + lane;
    const float old = entry < count ? scores[entry] : -2.f;
    const int old_id = entry < count ? ids[entry] : 0;
    int back = 0;
    for (unsigned bits = entering; bits; bits &= bits - 1) {
      const int other = __ffs(bits) - 1;
      const float s = __shfl_sync(kFullWarp, score, other);
      back += s > old;
      const int before = __popc(__ballot_sync(kFullWarp, old >= s));
      if (other == lane) place += before;
    }
    __syncwarp();
    if (entry < count && back > 0 && entry + back < rest) {
      scores[entry + back] = old;
      ids[entry + back] = old_id;
    }
    __syncwarp();
  }
  if ((entering >> lane & 1) && place < rest) {
    scores[place] = score;
    ids[place] = block;
  }
  __syncwarp();
  const int now = min(count + __popc(entering), rest);
  if (lane == 0) {
    store_shared(table.state(token) + 16, now);
    if (now == rest) store_shared(table.state(token), __float_as_int(scores[rest - 1]));
  }
  __syncwarp();
}

// A block and its score in every lane that has one (`scored`), in order of block.
__device__ __forceinline__ void consider_blocks(const cuda::SelectionArgs& a, const TokenTable& table, int token,
                                                bool scored, float score, int block, int lane) {
  const float4 s = load_shared_float4(table.state(token));
  const int local_first = __float_as_int(s.z), local_end = __float_as_int(s.w);
  const bool enters = scored && score > s.x && block < __float_as_int(s.y) && block >= a.init_blocks &&
                      (block < local_first || block >= local_end);
  const unsigned entering = __ballot_sync(kFullWarp, enters);
  if (entering) enter_blocks(table, token, entering, score, block, lane);
}

// The token's ids, ascending, then -1.
__device__ __forceinline__ void write_blocks(const cuda::SelectionArgs& a, const TokenTable& table, int token, int row,
                                             int head, int lane) {
  int32_t* const out = a.block_indices + (static_cast<int64_t>(row) * a.num_heads_k + head) * a.topk;
  const float4 s = load_shared_float4(table.state(token));
  const int candidates = load_shared(table.state(token) + 28);
  if (candidates <= a.topk) {
    for (int i = lane; i < a.topk; i += 32) out[i] = i < candidates ? i : -1;
    return;
  }
  const int local_first = __float_as_int(s.z), local_end = __float_as_int(s.w);
  const int forced = a.init_blocks + local_end - local_first;
  const int count = load_shared(table.state(token) + 16);
  const int* const ids = table.ids(token);
  for (int i = lane; i < forced + count; i += 32) {
    const int id = i < a.init_blocks ? i : i < forced ? local_first + i - a.init_blocks : ids[i - forced];
    int place = min(id, a.init_blocks) + min(max(id - local_first, 0), local_end - local_first);
    for (int j = 0; j < count; ++j) place += ids[j] < id;
    out[place] = id;
  }
  for (int i = forced + count + lane; i < a.topk; i += 32) out[i] = -1;
}

}  // namespace nsa::device
