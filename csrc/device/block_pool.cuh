// From probabilities of compressed keys to scores of blocks.
#pragma once

#include "device/tile.cuh"
#include "device/top_blocks.cuh"

namespace nsa::device {

// Rows of a group's table of partial results in shared memory: 32 columns, padded so that float2 stores of a fragment
// hit all banks.
inline constexpr int kPoolRowFloats = 40;
inline constexpr int kPoolBytes = 4 * cuda::kSelectionRows * kPoolRowFloats;

// What a lane knows of its two rows (g and g + 8 of the warp's 16).
struct SelectionRows {
  float lse2[2];  // lse * log2(e); +inf on rows that don't exist and on dead ones: their probabilities are 0
  int keys[2];    // compressed keys seen

  // Row i of a group is head i % G (from `first_head` on) of token i / G.
  __device__ __forceinline__ void load(const cuda::SelectionArgs& a, const SelectionTile& tile, int group_token,
                                       int tokens, int first_head, int warp, int lane) {
    constexpr float kLog2e = 1.4426950408889634f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * (warp % 4) + lane / 4 + 8 * r;
      const int token = row / a.group, head = first_head + row - token * a.group;
      lse2[r] = INFINITY;
      keys[r] = 0;
      if (token >= tokens || head >= a.group) continue;
      const float lse =
          *reinterpret_cast<const float*>(a.lse.at(tile.first_token + group_token + token, tile.head * a.group + head));
      if (lse != -INFINITY) lse2[r] = lse * kLog2e;
      keys[r] = tile.keys_of(a, group_token + token);
    }
  }
};

// Scores of 32 columns -> probabilities. Column 8 n + 2 t + i is key first + step * (8 n + 2 t + i).
template <int kStep>
__device__ __forceinline__ void probabilities(float (&s)[4][4], const SelectionRows& rows, float scale_log2, int first,
                                              bool masked, int lane) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = exp2_approx(s[n][i] * scale_log2 - rows.lse2[i / 2]);
  }
  if (!masked) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int seen = rows.keys[r] - first - kStep * 2 * (lane & 3);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (kStep * (8 * n + i) >= seen) s[n][2 * r + i] = 0.f;
      }
    }
  }
}

// Pooling of 32 blocks of 4 keys, l / d = 2: block j weighs keys 4 j - 1 .. 4 j + 3 by 1, 2, 2, 2, 1. The keys come
// sorted by class, key mod 4: column j of class c is key 4 j + c, so that a block's keys meet in one thread. Every
// block is summed in the same order, whatever its place: ((c0 + c1) + c2) * 2 + c3 + the c3 before.
//
// kWhole: both rows of a lane belong to one token (G a multiple of 16) and are added at once.
template <bool kWhole>
struct BlockPool {
  static constexpr int kRows = kWhole ? 1 : 2;
  float sum[kRows][8];  // of block 8 n + 2 t + i: [2 n + i]
  float before[kRows];  // in lanes t = 3: class 3's mass of the last block of the 32 before

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) before[r] = 0.f;
  }

  template <int kClass>
  __device__ __forceinline__ void add(const float (&p)[4][4], int lane) {
    float mass[kRows][8];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kWhole) {
          mass[0][2 * n + i] = p[n][i] + p[n][2 + i];
        } else {
          mass[0][2 * n + i] = p[n][i];
          mass[kRows - 1][2 * n + i] = p[n][2 + i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kClass == 3) {
        const bool last = (lane & 3) == 3;
        const int from = (lane & ~3) | ((lane + 3) & 3);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float mine = mass[r][2 * n + 1];
          const float left = __shfl_sync(kFullWarp, !last ? mine : n == 0 ? before[r] : mass[r][2 * n - 1], from);
          sum[r][2 * n] = fmaf(2.f, sum[r][2 * n], mass[r][2 * n]) + left;
          sum[r][2 * n + 1] = fmaf(2.f, sum[r][2 * n + 1], mine) + mass[r][2 * n];
        }
        before[r] = mass[r][7];
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[r][j] = kClass == 0 ? mass[r][j] : sum[r][j] + mass[r][j];
      }
    }
  }

  // The sum over the warp's 16 rows of block `lane`. A tree over the rows, the same one for every block.
  __device__ __forceinline__ float over_rows(int lane) const {
    static_assert(kWhole);
    float four[4], two[2];
    const bool bit4 = lane & 16, bit3 = lane & 8, bit2 = lane & 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float keep = bit4 ? sum[0][4 + j] : sum[0][j], give = bit4 ? sum[0][j] : sum[0][4 + j];
      four[j] = keep + __shfl_xor_sync(kFullWarp, give, 16);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float keep = bit3 ? four[2 + j] : four[j], give = bit3 ? four[j] : four[2 + j];
      two[j] = keep + __shfl_xor_sync(kFullWarp, give, 8);
    }
    const float keep = bit2 ? two[1] : two[0], give = bit2 ? two[0] : two[1];
    const float one = keep + __shfl_xor_sync(kFullWarp, give, 4);
    return __shfl_sync(kFullWarp, one, (lane & 24) | (lane & 1) << 2 | (lane >> 1 & 3));
  }
};

// A fragment of 16 x 32 into the group's table.
__device__ __forceinline__ void store_fragment(float* table, const float* low, const float* high, int warp, int lane) {
  float* const to = table + (16 * (warp % 4) + lane / 4) * kPoolRowFloats + 2 * (lane & 3);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    *reinterpret_cast<float2*>(to + 8 * n) = {low[2 * n], low[2 * n + 1]};
    *reinterpret_cast<float2*>(to + 8 * n + 8 * kPoolRowFloats) = {high[2 * n], high[2 * n + 1]};
  }
}

// Column `lane` of the table, summed over `rows` rows in order.
__device__ __forceinline__ float sum_rows(const float* table, int first_row, int rows, int lane) {
  const float* from = table + first_row * kPoolRowFloats + lane;
  float sum = 0.f;
#pragma unroll 4
  for (int row = 0; row < rows; ++row) sum += from[row * kPoolRowFloats];
  return sum;
}

// The scores of blocks [first, first + 32), complete in `pool`, for the group's tokens.
template <bool kWhole>
__device__ __forceinline__ void take_pooled(const cuda::SelectionArgs& a, const TokenTable& tokens, float* table,
                                            const BlockPool<kWhole>& pool, int num_tokens, int first, int warp,
                                            int lane) {
  if constexpr (kWhole) {
    const int token = warp % 4;
    const Entrance entrance = tokens.entrance(token);  // loaded under the sums; nobody's unless token < num_tokens
    float score = pool.over_rows(lane);
    if (a.group > 16) {
      table[token * kPoolRowFloats + lane] = score;
      sync_warpgroup(warp / 4);
      const int parts = a.group / 16;
      if (token < num_tokens) score = sum_rows(table, token * parts, parts, lane);
    }
    if (token < num_tokens) {
      const int stage = first / 32;
      consider_blocks<true>(a, tokens, token, entrance, (stage & (stage - 1)) == 0, true, score, first + lane, lane);
    }
  } else {
    store_fragment(table, pool.sum[0], pool.sum[1], warp, lane);
    sync_warpgroup(warp / 4);
    for (int token = warp % 4; token < num_tokens; token += 4) {
      const float score = sum_rows(table, token * a.group, a.group, lane);
      consider_blocks<false>(a, tokens, token, tokens.entrance(token), true, true, score, first + lane, lane);
    }
  }
  if (!kWhole || a.group > 16) sync_warpgroup(warp / 4);
}

// Any l, d, l': 32 keys in their order, key first + lane with the token's mass in lane `lane`. A block takes the keys
// [r j - (L - 1), r j + r), r = l' / d and L = l / d, one after the other; where it goes on past these 32, its sum
// waits among the token's open ones.
__device__ __forceinline__ void take_masses(const cuda::SelectionArgs& a, const TokenTable& tokens, int token,
                                            float mass, int first, int lane) {
  const int r = a.keys_per_block, overlap = a.overlap;
  const int scan_end = load_shared(tokens.state(token) + 4);
  const int last = min((first + 31 + overlap - 1) / r, scan_end - 1);
  const int width = min(overlap + r - 1, 32), weight = min(r, overlap);
  float* const open = tokens.open(token);
  for (int base = first / r; base <= last; base += 32) {
    const int block = base + lane;
    const bool real = block <= last;
    const int begin = r * block - overlap + 1, end = r * block + r;
    float sum = real && first > 0 && begin < first ? open[block % a.open_blocks] : 0.f;
    __syncwarp();
    const int from = max(begin, first), to = min(end, first + 32);
    for (int i = 0; i < width; ++i) {
      const int key = from + i;
      const float x = __shfl_sync(kFullWarp, mass, (key - first) & 31);
      const int w = min(weight, min(key - begin + 1, end - key));
      if (key < to) sum = __fadd_rn(sum, __fmul_rn(static_cast<float>(w), x));
    }
    const bool done = end <= first + 32;
    if (real && !done) open[block % a.open_blocks] = sum;
    __syncwarp();
    consider_blocks<false>(a, tokens, token, tokens.entrance(token), true, real && done, sum, block, lane);
  }
}

}  // namespace nsa::device
