// The running list of a token's best blocks, and the token's answer at the end. A warp works on one token at a time.
//
// Blocks come in ascending order, so a block that ties with the list's last entry never enters, and ties inside the
// list stand in order of id without a comparison of ids.
//
// Blocks that enter are first put aside, up to 32 of a warp, and then sorted into the list all at once: a lane a block
// or an entry counts what stands before it. One after the other, each block is a chain of two shuffles and a ballot; of
// 1024 blocks in random order 70 enter a list of 13, and all of them where scores rise.
#pragma once

#include "device/selection_tile.cuh"

namespace nsa::device {

// What a block must be to enter the list, and how many have been put aside.
struct Entrance {
  float threshold;
  int scan_end, local_first, local_end, aside;
};

// Shared memory of a group: states of its tokens, and its four warps' blocks set aside, 32 scores and 32 ids.
inline constexpr int kAsideAt = 32 * cuda::kSelectionRows, kAsideBytes = 256;
inline constexpr int kStateBytes = kAsideAt + 4 * kAsideBytes;

// Where a group's tokens have their states, lists and open sums.
struct TokenTable {
  uint32_t states;  // shared memory
  uint32_t aside;   // shared memory, of this warp
  char* lists;      // shared memory or workspace
  int token_bytes, topk;

  // Of group `nth` of the CTA's `groups`. shared_lists: unless the lists lie in the workspace.
  __device__ __forceinline__ void place(const cuda::SelectionArgs& a, uint32_t states_at, char* shared_lists,
                                        int groups, int nth, int warp) {
    states = states_at;
    aside = states_at + kAsideAt + warp % 4 * kAsideBytes;
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
    store_shared(to + 24, 0);
    store_shared(to + 28, s.candidates);
  }
  __device__ __forceinline__ Entrance entrance(int token) const {
    const float4 s = load_shared_float4(state(token));
    return {s.x, __float_as_int(s.y), __float_as_int(s.z), __float_as_int(s.w), load_shared(state(token) + 24)};
  }
};

// How many of the scores set aside (whole sixteens, at least `number`) exceed each of two scores. Counted in floats:
// comparisons have half the rate of additions, and an integer needs two of their kind.
__device__ __forceinline__ void count_above(uint32_t aside, int number, const float (&score)[2], int (&above)[2]) {
  float count[2][2] = {};
  for (int first = 0; first < number; first += 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = load_shared_float4(aside + 4 * first + 16 * i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        count[j][0] += set_above(four.x, score[j]) + set_above(four.y, score[j]);
        count[j][1] += set_above(four.z, score[j]) + set_above(four.w, score[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) above[j] = static_cast<int>(count[j][0] + count[j][1]);
}

// Entries of a descending list that are no less than the score.
__device__ __forceinline__ int entries_before(const float* scores, int count, float score) {
  int before = 0;
  for (int step = count > 0 ? 1 << (31 - __clz(count)) : 0; step > 0; step /= 2) {
    if (before + step <= count && scores[before + step - 1] >= score) before += step;
  }
  return before;
}

// Puts the `number` blocks set aside, in order of block, into the token's list.
__device__ __forceinline__ void enter_blocks(const TokenTable& table, int token, int number, int lane) {
  const uint32_t mine = table.aside + 4 * lane;
  if (lane >= number) store_shared(mine, __float_as_int(-1.f));  // less than any score
  __syncwarp();
  const int2 held = load_shared_pair(table.state(token) + 16);
  const int count = held.x, rest = held.y;
  float* const scores = table.scores(token);
  int* const ids = table.ids(token);
  const float score = __int_as_float(load_shared(mine));
  const int block = load_shared(mine + kAsideBytes / 2);
  int place = entries_before(scores, count, score);  // of this lane's block in the new list
  int above[2];                                      // blocks that go before this lane's, and before its entry
  // From the list's end to its beginning: entries only move back.
  int first = (count - 1) & ~31;
  do {
    const int entry = first + lane;
    const bool real = entry >= 0 && entry < count;
    const float old = real ? scores[entry] : INFINITY;
    const int old_id = real ? ids[entry] : 0;
    count_above(table.aside, number, {score, old}, above);
    const int to = entry + above[1];
    __syncwarp();
    if (above[1] > 0 && to < rest) {
      scores[to] = old;
      ids[to] = old_id;
    }
    __syncwarp();
    first -= 32;
  } while (first >= 0);
  // Blocks that tie have counted alike; then the order is that of the lanes.
  const unsigned taken = __reduce_or_sync(kFullWarp, lane < number ? 1u << above[0] : 0u);
  if (__popc(taken) < number) {
    for (int i = 0; i < number; ++i) above[0] += __shfl_sync(kFullWarp, score, i) == score && i < lane;
  }
  place += above[0];
  if (lane < number && place < rest) {
    scores[place] = score;
    ids[place] = block;
  }
  __syncwarp();
  const int now = min(count + number, rest);
  if (lane == 0) {
    store_shared(table.state(token) + 16, now);
    if (now == rest) store_shared(table.state(token), __float_as_int(scores[rest - 1]));
  }
  __syncwarp();
}

// A block and its score in every lane that has one (`scored`), in order of block. kOwn: the warp has no other token, so
// that blocks may stay aside until the next ones overflow them or `due`; settle_blocks ends that.
template <bool kOwn>
__device__ __forceinline__ void consider_blocks(const cuda::SelectionArgs& a, const TokenTable& table, int token,
                                                const Entrance& entrance, bool due, bool scored, float score, int block,
                                                int lane) {
  bool enters = scored && score > entrance.threshold && block < entrance.scan_end && block >= a.init_blocks &&
                (block < entrance.local_first || block >= entrance.local_end);
  unsigned entering = __ballot_sync(kFullWarp, enters);
  if (!entering) return;
  int aside = kOwn ? entrance.aside : 0;
  if (aside > 0 && (due || aside + __popc(entering) > 32)) {
    enter_blocks(table, token, aside, lane);
    enters = enters && score > __int_as_float(load_shared(table.state(token)));
    entering = __ballot_sync(kFullWarp, enters);
    aside = 0;
  }
  if (enters) {
    const uint32_t to = table.aside + 4 * (aside + __popc(entering & ((1u << lane) - 1)));
    store_shared(to, __float_as_int(score));
    store_shared(to + kAsideBytes / 2, block);
  }
  aside += __popc(entering);
  if constexpr (kOwn) {
    __syncwarp();  // every lane has read the number
    if (lane == 0) store_shared(table.state(token) + 24, aside);
    __syncwarp();
  } else {
    enter_blocks(table, token, aside, lane);
  }
}

// Leaves no block of the token aside.
__device__ __forceinline__ void settle_blocks(const TokenTable& table, int token, int lane) {
  const int aside = load_shared(table.state(token) + 24);
  if (aside == 0) return;
  enter_blocks(table, token, aside, lane);
  if (lane == 0) store_shared(table.state(token) + 24, 0);
  __syncwarp();
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
  settle_blocks(table, token, lane);
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
