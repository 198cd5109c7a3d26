// The CPU backend: the readable form of what the CUDA kernels compute, and fast enough to train with.
//
//   sequences     where each row stands: its sequence, its position, what it may see
//   block_lists   the caller's lists, made ascending and unique once
//   packed_keys   K and V in the compute type, in the two layouts that the products want
//   forward       for each query: scores, online softmax, P V
//   dq            for each query: dS K
//   inverted_index, dkdv   for each key block: P^T dO and dS^T Q over the queries that chose it
//   ranges        range attention: which run of keys each query sees, tiles of queries
//   range_forward, range_backward, range_pieces   each tile of queries against its run of keys
//   select_blocks, block_ranking   the compressed branch's probabilities again, pooled to blocks and ranked as they
//   come kernels       products and row operations, compiled once per instruction set and chosen at run time
//
// Every output element is computed by one thread in an order that depends on sizes alone: the same bits for any thread
// count.
#pragma once

#include <cstddef>

#include "nsa_cuda/nsa.h"

namespace nsa::cpu {

// Bytes of scratch; a function of sizes and the number of threads. Arguments have passed validation.
// With R bytes of the compute type (8 for float64, else 4) and E = total_q Hkv S entries, the terms that grow are
//   forward   R Hkv total_k (Dk + Dv) + 4 E
//   backward  R Hkv total_k (2 Dk + Dv) + 12 E + R total_q Hq, and R l' (Dk + Dv) E / 1024 where l' <= 128;
// 100 to 300 KiB per thread come on top. Parts that a call doesn't use are never touched.
std::size_t workspace_bytes(const SelectedAttentionForward& args);
std::size_t workspace_bytes(const SelectedAttentionBackward& args);

// Shapes and pointers have passed validation; values in block_indices, block_counts and cu_seqlens_* may be anything.
void selected_attention(const SelectedAttentionForward& args);
void selected_attention(const SelectedAttentionBackward& args);

void gated_sum(const GatedSumForward& args);
void gated_sum(const GatedSumBackward& args);

// The terms that grow, with piece sums of at most 32 + 2 Hkv times R (Dk + Dv) bytes for each k row; in a window, of
// R (Dk + Dv) Hkv (total_q + total_k) and 128 + 4 Hkv windows' worth:
//   forward   R Hkv total_k (Dk + Dv)
//   backward  R Hkv total_k (2 Dk + Dv) and the piece sums
//   select    R Hkv total_k Dk; a thread holds the masses of (l + l') / d keys more than a chunk, and n ids, for a tile
std::size_t workspace_bytes(const RangeAttentionForward& args);
std::size_t workspace_bytes(const RangeAttentionBackward& args);
void range_attention(const RangeAttentionForward& args);
void range_attention(const RangeAttentionBackward& args);

std::size_t workspace_bytes(const BlockSelection& args);
void select_blocks(const BlockSelection& args);

}  // namespace nsa::cpu
