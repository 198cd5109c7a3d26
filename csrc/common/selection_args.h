// The arguments of the block selection kernels.
#pragma once

#include "common/kernel_args.h"

namespace nsa::cuda {

// Consecutive tokens of one sequence make a tile; a CTA takes a tile of one kv head at a time. Device pointers and
// sizes, passed to kernels by value.
struct SelectionPlan {
  // Packed calls only, else null. [B + 1] repaired cu_seqlens, k's in tokens, and where a sequence's k rows begin.
  int32_t *q_begin, *key_token_begin, *key_begin;
  // Packed calls only. [runs + 1] q rows and tiles before each run: the rows before the first sequence, the sequences,
  // the rows behind the last one.
  int32_t *token_begin, *tile_begin;
  int runs, tokens_per_run;  // batched: a run is a sequence
  Divisor tiles_per_run;
  int max_tiles;  // of one kv head; packed: an upper bound
  int tokens_per_tile;
  int total_q, total_k;
};

struct SelectionArgs {
  SelectionPlan plan;
  TensorArg q, k, lse;  // k: compressed keys; lse: float
  int32_t* block_indices;
  const int32_t* q_offsets;
  int64_t q_offset;
  bool has_q_offset, causal;
  float scale_log2;                                // softmax_scale * log2(e)
  Divisor num_heads_k, group;                      // Hkv, G
  int num_tokens, num_keys, run_k;                 // batched: Tk, Nc, and k rows from one batch to the next
  int64_t kernel_size, kernel_stride, block_size;  // l, d, l'
  int keys_per_block, overlap;                     // l' / d, l / d
  int topk, init_blocks, local_blocks;
  int tokens_per_group;  // whole tokens (times G heads) among the 64 rows of a group of four warps
  int open_blocks;       // per token, sums of blocks whose last key is yet to come
  int token_bytes;       // of a token's list and open sums
  char* lists;           // [kMaxSelectionCtas, groups, tokens_per_group, token_bytes], null: in shared memory
};

using SelectionKernel = Status (*)(const SelectionArgs&, const Launch&);

inline constexpr int kSelectionRows = 64;      // q rows (token * G + head) of a group of four warps
inline constexpr int kMaxSelectionCtas = 256;  // what the workspace has lists for
inline constexpr int kSharedListBytes = 8192;  // of a group; larger lists lie in the workspace

// Groups of four warps of a family's kernels. On Hopper as many as leave 227 KiB a stage of keys with the largest
// tables and lists; with D 256 three would leave it one even without them.
constexpr int selection_groups(Backend family, int64_t dk) {
  if (family == Backend::kSm90) return dk == 256 ? 2 : dk == 192 ? 3 : 4;
  return dk <= 128 ? 2 : 1;
}

// What the Hopper kernel pools in registers: l' = 4 d, l = 2 d (the paper's 64, 16, 32), and a group in 64 rows.
constexpr bool pools_by_class(const SelectionArgs& a) {
  return a.keys_per_block == 4 && a.overlap == 2 && a.group <= kSelectionRows;
}

// CTAs of a launch that would keep `wanted` busy: no more than there are tiles, or lists in the workspace.
inline int selection_ctas(const SelectionArgs& a, int wanted) {
  const int64_t tiles = static_cast<int64_t>(a.plan.max_tiles) * a.num_heads_k;
  if (a.lists && wanted > kMaxSelectionCtas) wanted = kMaxSelectionCtas;
  return tiles < wanted ? static_cast<int>(tiles) : wanted;
}

}  // namespace nsa::cuda
