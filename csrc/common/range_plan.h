// Who sees whom in range attention (compressed and sliding-window branch), as data: the kernels know no other mask.
//
// A query row sees one run of k rows, and a k row is seen by one run of q rows. Both ends of both runs only grow along
// a sequence, so the runs of a tile's first and last row bound those of all its rows. No tile straddles sequences.
#pragma once

#include "common/plan.h"

namespace nsa::cuda {

// Device pointers and sizes, passed to kernels by value. "Run" of tables: as in Units, the rows before the first
// sequence, the sequences, the rows behind the last one (packed); the sequences (batched).
struct RangePlan {
  const int2* keys;     // [total_q] {first, end} of the k rows that a q row sees; first == end: none
  const int2* queries;  // [total_k] {first, end} of the q rows that see a k row
  Units units;          // of q rows: token * G + head of the group; a tile is `alignment` units
  Units key_units;      // of k rows
  // Packed: [runs + 1] partial tiles of one kv head before each run of key_units; null: run * partials_per_run
  const int32_t* partial_begin;
  // Packed calls only, else null. [B + 1] repaired cu_seqlens, in tokens, and where a sequence's k rows begin.
  int32_t* q_begin;
  int32_t* key_token_begin;
  int32_t* key_begin;
  int total_q, total_k;
  int run_k, run_keys;   // batched: k rows from one run to the next, and how many of them are keys (Tk or Nc)
  Divisor chunk;         // q rows that one work item of dK and dV takes; split runs go through fp32 partial tiles
  int max_chunks;        // of a key tile
  int partials_per_run;  // batched
  int max_partials;      // of one kv head; 0: nothing is split
};

// Rows of a tile of the kernel that a plan is for, in units of 16.
struct RangeTiles {
  int query_units, key_units;
};

// k rows of one sequence that a batched call can see: Tk or Nc.
int64_t range_keys(const RangeAttentionProblem& problem);

RangePlan carve_range_plan(const RangeAttentionProblem& problem, const RangeTiles& tiles, Carver& carver);
Status make_range_plan(const RangeAttentionProblem& problem, const RangePlan& plan, cudaStream_t stream);

}  // namespace nsa::cuda
