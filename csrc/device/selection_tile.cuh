// Tiles of block selection: which tokens, which compressed keys and which candidates.
#pragma once

#include "common/selection_args.h"
#include "device/ptx.cuh"
#include "device/runs.cuh"

namespace nsa::device {

// What is known of a token of a group; with the number of its blocks set aside (top_blocks.cuh) 32 bytes of shared
// memory. A block j is scored where init_blocks <= j < scan_end and it isn't one of the local blocks [local_first,
// local_end), which are taken anyway, as are those before init_blocks.
struct TokenState {
  float threshold;  // scores that don't exceed it can't enter the list
  int scan_end;     // 0: nothing to score, since every candidate is taken, or only the forced ones
  int local_first, local_end;
  int count;  // entries of the list
  int rest;   // entries that the list may hold: topk less the forced blocks
  int candidates;
};

struct SelectionTile {
  bool real;                // packed: max_tiles is a bound
  int head;                 // kv head
  int first_token, tokens;  // q rows
  int first_key, num_keys;  // k row, Nc
  int num_blocks;           // 0 outside every sequence
  int64_t position;         // of the first token

  // Tiles with the most keys come first where masks are causal; heads alternate, so that neighbouring CTAs read the
  // same part of the sequence.
  __device__ __forceinline__ SelectionTile(const cuda::SelectionArgs& a, int tile) {
    const cuda::SelectionPlan& plan = a.plan;
    const int nth = tile / a.num_heads_k;
    head = tile - nth * a.num_heads_k;
    const int place = plan.max_tiles - 1 - nth;
    int run, sequence, q_begin, q_length, tokens_k;
    if (plan.tile_begin) {
      run = find_run(plan.tile_begin, plan.runs, place);
      real = run < plan.runs;
      sequence = run - 1;
      const bool inside = real && sequence >= 0 && sequence < plan.runs - 2;
      const int in_run = real ? (place - __ldg(plan.tile_begin + run)) * plan.tokens_per_tile : 0;
      q_begin = real ? __ldg(plan.token_begin + run) : 0;
      q_length = real ? __ldg(plan.token_begin + run + 1) - q_begin : 0;
      first_token = q_begin + in_run;
      tokens = min(plan.tokens_per_tile, q_length - in_run);
      first_key = inside ? __ldg(plan.key_begin + sequence) : 0;
      num_keys = inside ? __ldg(plan.key_begin + sequence + 1) - first_key : 0;
      tokens_k = inside ? __ldg(plan.key_token_begin + sequence + 1) - __ldg(plan.key_token_begin + sequence) : 0;
      if (!inside) sequence = 0;
      num_blocks = inside ? static_cast<int>((tokens_k + a.block_size - 1) / a.block_size) : 0;
      position = inside ? in_run : 0;
    } else {
      sequence = place / plan.tiles_per_run;
      real = true;
      const int in_run = (place - sequence * plan.tiles_per_run) * plan.tokens_per_tile;
      q_length = plan.tokens_per_run;
      first_token = sequence * q_length + in_run;
      tokens = min(plan.tokens_per_tile, q_length - in_run);
      first_key = sequence * a.run_k;
      num_keys = a.num_keys;
      tokens_k = a.num_tokens;
      num_blocks = static_cast<int>((tokens_k + a.block_size - 1) / a.block_size);
      position = in_run;
    }
    if (num_blocks == 0) return;
    position += a.q_offsets      ? __ldg(a.q_offsets + sequence)
                : a.has_q_offset ? a.q_offset
                                 : static_cast<int64_t>(tokens_k) - q_length;
  }

  // Compressed keys that token i of the tile sees: the first ones of its sequence.
  __device__ __forceinline__ int keys_of(const cuda::SelectionArgs& a, int i) const {
    if (!a.causal) return num_keys;
    const int64_t p = position + i;
    if (p < a.kernel_size - 1) return 0;
    return static_cast<int>(min(static_cast<int64_t>(num_keys), (p - a.kernel_size + 1) / a.kernel_stride + 1));
  }

  __device__ __forceinline__ int candidates_of(const cuda::SelectionArgs& a, int i) const {
    if (!a.causal) return num_blocks;
    const int64_t p = position + i;
    return p < 0 ? 0 : static_cast<int>(min(static_cast<int64_t>(num_blocks), p / a.block_size + 1));
  }

  // Blocks that have to be scored for any of the tile's tokens: the last one's.
  __device__ __forceinline__ int scan_end(const cuda::SelectionArgs& a) const {
    const int candidates = candidates_of(a, tokens - 1);
    return real && candidates > a.topk ? candidates : 0;
  }

  __device__ __forceinline__ TokenState state_of(const cuda::SelectionArgs& a, int i) const {
    TokenState s = {};
    if (i >= tokens) return s;
    const int64_t p = position + i, l = a.block_size;
    const int64_t own = p >= 0 ? p / l : -((-p + l - 1) / l);
    s.candidates = candidates_of(a, i);
    const auto clamp = [&](int64_t block) {
      return static_cast<int>(min(max(block, int64_t{0}), static_cast<int64_t>(s.candidates)));
    };
    const int init_end = min(a.init_blocks, s.candidates);
    s.local_first = max(clamp(own + 1 - a.local_blocks), init_end);
    s.local_end = max(clamp(own + 1), s.local_first);
    s.rest = a.topk - init_end - (s.local_end - s.local_first);
    s.threshold = -1.f;
    s.scan_end = s.candidates > a.topk && s.rest > 0 ? s.candidates : 0;
    return s;
  }
};

}  // namespace nsa::device
