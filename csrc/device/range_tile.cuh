// Tiles of range attention: query rows against the run of keys that any of them sees, and keys against the run of query
// rows that sees any of them.
#pragma once

#include "common/range_args.h"
#include "device/row_stats.cuh"
#include "device/runs.cuh"
#include "device/tile.cuh"

namespace nsa::device {

// The run (of plan tables) that holds a unit, and where the unit lies in it.
struct RunOfUnit {
  bool real;
  int run, begin, end;  // q or k rows
  int unit;             // of the run

  __device__ __forceinline__ RunOfUnit(const cuda::Units& units, int u) {
    if (units.unit_begin) {
      run = find_run(units.unit_begin, units.runs, u);
      real = run < units.runs;
      begin = real ? __ldg(units.token_begin + run) : 0;
      end = real ? __ldg(units.token_begin + run + 1) : 0;
      unit = real ? u - __ldg(units.unit_begin + run) : 0;
    } else {
      run = u / units.units_per_run;
      real = run < units.runs;
      begin = run * units.tokens_per_run;
      end = begin + units.tokens_per_run;
      unit = u - run * units.units_per_run;
    }
  }
};

// kRows query rows (token * G + head of the group) of one sequence and kv head.
template <int kRows>
struct RangeQueries {
  bool real;
  int head;                               // kv head
  int first_token, end_token;             // of the tile's first row; behind the sequence
  int first_group;                        // head in group of the first row
  int first, end;                         // k rows that any row sees
  int first_of_all, end_of_all, run_end;  // ... that every row sees; behind the sequence's keys

  struct Row {
    bool real;
    int token, head;  // q row, query head
  };

  // Tiles with the most keys come first where masks are causal; heads alternate, so that neighbouring CTAs see the same
  // part of the sequence.
  __device__ __forceinline__ RangeQueries(const cuda::RangePlan& plan, int tile, int tiles_per_head,
                                          const cuda::Divisor& num_heads_k, const cuda::Divisor& group) {
    const int nth = tile / num_heads_k;
    head = tile - nth * num_heads_k;
    const RunOfUnit run(plan.units, (tiles_per_head - 1 - nth) * (kRows / 16));
    real = run.real;
    first = end = first_of_all = end_of_all = run_end = 0;
    first_token = end_token = first_group = 0;
    if (!real) return;
    const int row = 16 * run.unit;
    first_token = run.begin + row / group;
    first_group = row % group;
    end_token = run.end;
    const int last_token = min(run.begin + (row + kRows - 1) / group, end_token - 1);
    const int2 low = __ldg(plan.keys + first_token), high = __ldg(plan.keys + last_token);
    first = low.x;
    end = high.y;
    first_of_all = high.x;
    end_of_all = low.y;
    run_end =
        plan.units.unit_begin ? __ldg(plan.key_units.token_begin + run.run + 1) : run.run * plan.run_k + plan.run_keys;
  }

  // Through shared memory (kInfoBytes), from the warp that found the tile to those that work on it.
  static constexpr int kInfoBytes = 48;
  RangeQueries() = default;
  __device__ __forceinline__ void leave(uint32_t at) const {
    const int words[] = {head, first_token, end_token, first_group, first, end, first_of_all, end_of_all, run_end};
#pragma unroll
    for (int i = 0; i < 9; ++i) store_shared(at + 4 * i, words[i]);
  }
  __device__ __forceinline__ void fetch_rows(uint32_t at) {
    const int2 a = load_shared_pair(at), b = load_shared_pair(at + 8);
    head = a.x;
    first_token = a.y;
    end_token = b.x;
    first_group = b.y;
  }
  __device__ __forceinline__ void fetch_keys(uint32_t at) {
    const int2 a = load_shared_pair(at + 16), b = load_shared_pair(at + 24);
    first = a.x;
    end = a.y;
    first_of_all = b.x;
    end_of_all = b.y;
    run_end = load_shared(at + 32);
  }

  __device__ __forceinline__ Row row(int i, const cuda::Divisor& group) const {
    const int step = (first_group + i) / group;
    const int token = first_token + step;
    return {token < end_token, token, head * group + first_group + i - step * group};
  }
  // Stages of `keys` keys.
  __device__ __forceinline__ int num_stages(int keys) const { return (end - first + keys - 1) / keys; }
  // Whether every row sees all of [key, key + keys).
  __device__ __forceinline__ bool all_see(int key, int keys) const {
    return first_of_all <= key && key + keys <= end_of_all;
  }
};

// Which keys of a stage a lane's two rows (g and g + 8 of the warp's 16) see.
struct RangeVisibility {
  int2 keys[2];  // k rows {first, end}
  int stage;     // k row of the stage's first key
  bool all;

  __device__ __forceinline__ void set_row(int r, bool real, int token, const cuda::RangePlan& plan) {
    keys[r] = real ? __ldg(plan.keys + token) : int2{0, 0};
  }
  __device__ __forceinline__ bool everything() const { return all; }
  // Whether row r sees column 8 n + 2 t + i of the stage.
  __device__ __forceinline__ bool sees(int r, int n, int i, int lane) const {
    const int key = stage + 2 * (lane & 3) + 8 * n + i;
    return key >= keys[r].x && key < keys[r].y;
  }
};

// kKeys keys of one sequence and kv head, and one chunk of the query rows that see any of them.
template <int kKeys>
struct RangeItem {
  bool exists;                      // the tile does
  bool real;                        // ... and sees rows of this chunk, or none at all and this is its chunk 0
  int head;                         // kv head
  int first_key, keys;              // k rows
  int begin, tokens;                // q rows of this item
  int partial;                      // partial tile; -1: the run is in one piece
  int first_partial, num_partials;  // of the whole tile

  __device__ __forceinline__ RangeItem(const cuda::RangePlan& plan, int head_, int tile, int chunk) : head(head_) {
    const RunOfUnit run(plan.key_units, tile * (kKeys / 16));
    exists = real = run.real;
    if (!exists) return;
    first_key = run.begin + 16 * run.unit;
    keys = min(run.end - first_key, kKeys);
    const int first = __ldg(plan.queries + first_key).x, end = __ldg(plan.queries + first_key + keys - 1).y;
    int run_q, run_q_end;
    if (plan.units.unit_begin) {
      run_q = __ldg(plan.units.token_begin + run.run);
      run_q_end = __ldg(plan.units.token_begin + run.run + 1);
    } else {
      run_q = run.run * plan.units.tokens_per_run;
      run_q_end = run_q + plan.units.tokens_per_run;
    }
    const int first_chunk = first < end ? (first - run_q) / plan.chunk : 0;
    const int last_chunk = first < end ? (end - 1 - run_q) / plan.chunk : 0;
    num_partials = last_chunk - first_chunk + 1;
    real = chunk >= first_chunk && chunk <= last_chunk;
    begin = chunk == first_chunk ? first : run_q + chunk * plan.chunk;
    tokens = (chunk == last_chunk ? end : run_q + (chunk + 1) * plan.chunk) - begin;
    const int chunks = max(run_q_end - run_q - 1, 0) / plan.chunk + 1;
    const int before = plan.partial_begin ? __ldg(plan.partial_begin + run.run) : run.run * plan.partials_per_run;
    first_partial = head * plan.max_partials + before + 16 * run.unit / kKeys * chunks + first_chunk;
    partial = num_partials > 1 ? first_partial + chunk - first_chunk : -1;
  }

  // Rows (token * G + head) of the item that see all of its keys: {first, end}.
  __device__ __forceinline__ int2 rows_of_all(const cuda::RangePlan& plan, const cuda::Divisor& group) const {
    const int first = __ldg(plan.queries + first_key + keys - 1).x, end = __ldg(plan.queries + first_key).y;
    return {(first - begin) * group, (end - begin) * group};
  }
};

// Query rows that see a lane's two keys (g and g + 8 of the warp's 16), as rows (token * G + head) of an item.
struct RowVisibility {
  int first[2], end[2];
  __device__ __forceinline__ void set_key(int r, bool real, int key, int begin, const cuda::Divisor& group,
                                          const cuda::RangePlan& plan) {
    const int2 run = real ? __ldg(plan.queries + key) : int2{0, 0};
    first[r] = (run.x - begin) * group;
    end[r] = (run.y - begin) * group;
  }
  // Through shared memory, 8 bytes a key: {first, end}.
  static __device__ __forceinline__ void leave(uint32_t at, bool real, int key, int begin, const cuda::Divisor& group,
                                               const cuda::RangePlan& plan) {
    const int2 run = real ? __ldg(plan.queries + key) : int2{0, 0};
    store_shared(at, (run.x - begin) * group);
    store_shared(at + 4, (run.y - begin) * group);
  }
  __device__ __forceinline__ void fetch(uint32_t at) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int2 run = load_shared_pair(at + 64 * r);
      first[r] = run.x;
      end[r] = run.y;
    }
  }
  __device__ __forceinline__ bool sees(int r, int row) const { return row >= first[r] && row < end[r]; }
};

// S^T -> P^T and dP^T -> dS^T for 16 keys (this lane: two of them) x 8 kColumns query rows, in place; the rows follow
// `first_row` of the item. lse2, delta: of the first row, in shared memory, 4 bytes a row. masked: not all is seen, or
// some gate is negative; that is a pass of its own, which most stages don't need. A branch for every 8 rows instead
// kept ptxas from moving loads ahead of their use: 40 % of the Hopper kernel's time went there.
template <int kColumns>
__device__ __forceinline__ void range_probabilities(float (&p)[kColumns][4], uint32_t lse2, uint32_t delta,
                                                    int first_row, const RowVisibility& sees, bool masked,
                                                    float scale_log2, int lane) {
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
#pragma unroll
    for (int i = 0; i < 4; ++i)
      p[n][i] = sees.sees(i / 2, first_row + 8 * n + row + i % 2) ? signed_by(i % 2 ? two.y : two.x, p[n][i]) : 0.f;
  }
}

template <int kColumns>
__device__ __forceinline__ void range_gradients(const float (&p)[kColumns][4], float (&ds)[kColumns][4], uint32_t delta,
                                                int first_row, const RowVisibility& sees, bool masked, int lane) {
  const int row = 2 * (lane & 3);
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const float2 two = load_shared_float2(delta + 4 * (8 * n + row));
#pragma unroll
    for (int i = 0; i < 4; ++i) ds[n][i] = p[n][i] * (ds[n][i] - (i % 2 ? two.y : two.x));
  }
  if (!masked) return;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {  // P is 0, but 0 * NaN isn't
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!sees.sees(i / 2, first_row + 8 * n + row + i % 2)) ds[n][i] = 0.f;
    }
  }
}

}  // namespace nsa::device
