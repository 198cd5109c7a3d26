// What every CUDA kernel of selected attention knows about who sees whom, in one form for batched and packed calls.
//
// Rows of all sequences are numbered through ("q row" 0 .. total_q, "k row" 0 .. total_k), and so are the blocks of all
// sequences, so that a tile of queries may straddle sequences without noticing. The caller's lists (any order, any
// values, any strides) are turned once into ascending lists of such block numbers without duplicates or invalid
// entries: kernels never check an index again. Cost: 20 us for 64K tokens x 4 heads x 16 entries in ascending order on
// an H100.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include <vector_types.h>

#include "common/divisor.h"
#include "nsa_cuda/nsa.h"

namespace nsa::cuda {

inline constexpr int kNoBlock = INT_MAX;  // pads the lists: sorts behind every block

// Which 16 rows an MMA tile, a "unit", holds. Row = token * G + head of the group; otherwise rows fill units without
// padding, but a sequence begins a new unit, and for wgmma, which multiplies 64 rows, a new `alignment` of four units:
// no matrix product holds rows of two sequences, where a NaN in one would reach the other as 0 * NaN.
struct Units {
  // Packed: the tokens and the units before each run of rows: those before the first sequence, the sequences, those
  // behind the last one. [runs + 1] each, made on the device. Null: runs of equal length.
  const int32_t* token_begin;
  const int32_t* unit_begin;
  int runs;
  int tokens_per_run;  // where unit_begin is null
  Divisor units_per_run;
  int max_units;  // of one kv head; packed: an upper bound
  int alignment;  // 1, or 4 for wgmma
};

// Device pointers and sizes, passed to kernels by value.
struct Plan {
  const int32_t* lists;     // [Hkv, total_q, S] block numbers, ascending, padded with kNoBlock
  const int32_t* last_key;  // [total_q] k row of the last key that the row may see; -1 on rows outside every sequence
  const int2* blocks;       // [num_blocks] {first k row, keys}; {0, 0} for numbers that no sequence uses
  // Packed calls only, else null: [B + 1] repaired cu_seqlens and the blocks before each sequence
  const int32_t* q_begin;
  const int32_t* key_begin;
  const int32_t* block_begin;
  Units units;
  int total_q, total_k;
  int num_blocks;  // sum over sequences of ceil(Tk / l'); packed: an upper bound
  int block_size;  // l'
  int list_width;  // S
};

// The union of the lists of every query tile, made before the kernels whose producers only have time to read it:
// walking it there took 1500 cycles a stage, a third more than the loads. One entry for each part of a block (at most
// `part` keys): the blocks that some warpgroup shares from the front on, in ascending order, and those that none does
// (device::StageFlags::kAlone) from the back on, which a consumer takes last.
struct TileUnions {
  int32_t* entries;  // [Hkv * tiles_per_head, capacity, words]: {k row of the first key, keys, flags, members...}
  int2* counts;      // [Hkv * tiles_per_head] {entries at the front, at the back}; {0, 0}: the tile has no rows
  int warps;         // units a tile
  Divisor tiles_per_head;
  int part;             // keys
  int capacity, words;  // entries a tile, 32-bit words an entry
  bool in_order;        // all entries at the front
};

// CTAs of a kernel whose threads stride over their work.
inline int grid_size(int64_t threads, int per_block) {
  const int64_t blocks = (threads + per_block - 1) / per_block;
  return static_cast<int>(blocks < 1 ? 1 : blocks > 65536 ? 65536 : blocks);
}

struct TileSize {
  int warps, keys;  // units of 16 rows, keys a stage
};

// Hands out 256-byte aligned pieces of the workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// Sizes, and the pieces of workspace that make_plan() fills.
Plan carve_plan(const SelectedAttentionProblem& problem, Carver& carver, int unit_alignment = 1);

// Launches the kernels that fill the plan's arrays.
Status make_plan(const SelectedAttentionProblem& problem, const Plan& plan, cudaStream_t stream);

TileUnions carve_unions(const SelectedAttentionProblem& problem, const Plan& plan, TileSize size, bool in_order,
                        Carver& carver);
Status make_unions(const Plan& plan, const TileUnions& unions, int num_heads_k, Divisor group, cudaStream_t stream);

// How a backward is cut into passes over windows of q rows, one after the other, so that the dS which dK's kernel
// leaves for dQ's (BackwardArgs::ds) takes a bounded part of the memory however long the sequence is.
struct Windows {
  int count, rows;
  int buffers;  // 2: a tile of queries may lie over the border of two windows and needs the dS of both
};

// Some of the query rows that chose a block: what a CTA of dK and dV does. A list longer than `chunk` is split into
// items of `chunk` entries whose results go to fp32 partial tiles, added up later in the same fixed order every time.
struct alignas(16) WorkItem {
  int head;             // kv head
  int first_key, keys;  // k row of the block's first, how many; 0: there is no such item
  int entries;
  int64_t begin;  // entry of InvertedIndex::rows
  int partial;    // tile of the window, -1: the list is in one piece
  int pieces;     // the list's, in its first one; else 0
};

// The lists turned round: for every (window, kv head, block) the window's q rows that chose it, ascending.
// List = (window * Hkv + kv head) * num_blocks + block.
struct InvertedIndex {
  const int32_t* rows;    // [E] q rows
  const int64_t* begins;  // [num_lists * spans + 1] where in rows a list's part of a span starts
  const WorkItem* items;  // [windows, max_items]
  // [Hkv, total_q, S], null: not wanted. Where an entry of the lists stands among those of its window; with two buffers
  // every second window counts from buffer_entries on. kTwoHalves: its block has more than 64 keys. kNoPlace: the list
  // has no such entry. (Places stay below 2^31: so many dS would be 256 GiB.)
  const uint32_t* places;
  static constexpr uint32_t kNoPlace = ~0u, kTwoHalves = 1u << 31;
  int64_t buffer_entries;
  int num_lists, window_lists;  // of all windows, of one
  int spans, span_rows;         // of a window
  Windows windows;
  int window;            // the one at work
  bool ordered;          // items stand by their middle rows, not by blocks
  int chunk;             // entries of an item
  int64_t max_items;     // of a window; the grid is launched with them
  int64_t max_partials;  // of a window

  __host__ __device__ int first_list() const { return window * window_lists; }
#ifdef __CUDACC__
  __device__ __forceinline__ int64_t list_begin(int list) const { return begins[static_cast<int64_t>(list) * spans]; }
#endif
  // What is added to a place in this window.
  __host__ __device__ int64_t first_place() const { return window % 2 ? buffer_entries : 0; }
};

InvertedIndex carve_index(const SelectedAttentionProblem& problem, const Plan& plan, const Windows& windows,
                          bool wants_places, Carver& carver, void** scratch);
Status make_index(const Plan& plan, const InvertedIndex& index, int num_heads_k, void* scratch, cudaStream_t stream);

Status cuda_status(int error, const char* what);  // error: a cudaError_t
Status make_status(StatusCode code, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace nsa::cuda
