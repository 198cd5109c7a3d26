// Where rows stand. Rows of all sequences are numbered through (q row 0 .. total_q, k row 0 .. total_k), and so are
// their blocks, whether the call is batched or packed.
#pragma once

#include <cstdint>

#include "cpu/workspace.h"
#include "nsa_cuda/nsa.h"

namespace nsa::cpu {

struct Sequences {
  std::int64_t batch = 0;                 // B
  std::int64_t total_q = 0, total_k = 0;  // rows
  std::int64_t num_blocks = 0;            // of all sequences; packed: an upper bound
  std::int64_t* q_begin = nullptr;        // [B + 1] first q row of each sequence; packed: repaired cu_seqlens_q
  std::int64_t* k_begin = nullptr;        // [B + 1]
  std::int64_t* block_begin = nullptr;    // [B + 1] number of each sequence's block 0
};

// Keys [begin, end), as k rows.
struct KeyRange {
  std::int64_t begin = 0, end = 0;
};

// What one query row may see.
struct QueryPlace {
  std::int64_t first_block = 0;         // number of its sequence's block 0
  std::int64_t num_visible_blocks = 0;  // local ids 0 .. num_visible_blocks - 1 are valid; 0: the row is dead
  KeyRange keys;                        // of its sequence, and (causal) none after its position
};

// Index of a row in a Tensor: batched {b, t}, packed {0, row}.
struct RowIndex {
  std::int64_t batch = 0, row = 0;
};

Sequences carve_sequences(const SelectedAttentionProblem& problem, Carver& carver);
void fill_sequences(const SelectedAttentionProblem& problem, const Sequences& sequences);

QueryPlace place_query(const SelectedAttentionProblem& problem, const Sequences& sequences, std::int64_t q_row);

// All keys of a block, given its number; empty for numbers that no sequence uses.
KeyRange keys_of_block(const SelectedAttentionProblem& problem, const Sequences& sequences, std::int64_t block);

// Running maximum of cu_seqlens [B + 1] from 0, clamped to `total`: every row belongs to at most one sequence.
void repair_offsets(const std::int32_t* cu_seqlens, std::int64_t batch, std::int64_t total, std::int64_t* begin);

// The last b with begin[b] <= value, begin [batch + 1] ascending: -1 before all sequences, `batch` past them.
std::int64_t find_sequence(const std::int64_t* begin, std::int64_t batch, std::int64_t value);

template <typename Problem>
bool is_packed(const Problem& problem) {
  return problem.cu_seqlens_q != nullptr;
}

// Position of the first query of sequence b; lengths in tokens.
template <typename Problem>
std::int64_t position_of_first_query(const Problem& problem, std::int64_t b, std::int64_t length_q,
                                     std::int64_t length_k) {
  if (problem.q_offsets != nullptr) return problem.q_offsets[b];
  return problem.has_q_offset ? problem.q_offset : length_k - length_q;
}

template <typename Problem>
RowIndex index_of_row(const Problem& problem, std::int64_t row, std::int64_t rows_per_batch) {
  return is_packed(problem) ? RowIndex{0, row} : RowIndex{row / rows_per_batch, row % rows_per_batch};
}
template <typename Problem>
RowIndex index_of_q(const Problem& problem, std::int64_t q_row) {
  return index_of_row(problem, q_row, problem.seqlen_q);
}
template <typename Problem>
RowIndex index_of_k(const Problem& problem, std::int64_t k_row) {
  return index_of_row(problem, k_row, problem.seqlen_k);
}

// Elements from the start of a tensor to [batch, row, head].
template <typename AnyTensor>
std::int64_t offset_of(const AnyTensor& tensor, RowIndex index, std::int64_t head) {
  return index.batch * tensor.batch_stride + index.row * tensor.row_stride + head * tensor.head_stride;
}

inline std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// Address of the D elements at [batch, row, head].
inline void* address_of(const Tensor& tensor, Dtype dtype, RowIndex index, std::int64_t head) {
  return static_cast<char*>(tensor.data) + offset_of(tensor, index, head) * bytes_of(dtype);
}

}  // namespace nsa::cpu
