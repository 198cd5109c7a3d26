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

inline bool is_packed(const SelectedAttentionProblem& problem) { return problem.cu_seqlens_q != nullptr; }

inline RowIndex index_of_row(const SelectedAttentionProblem& problem, std::int64_t row, std::int64_t rows_per_batch) {
  return is_packed(problem) ? RowIndex{0, row} : RowIndex{row / rows_per_batch, row % rows_per_batch};
}
inline RowIndex index_of_q(const SelectedAttentionProblem& problem, std::int64_t q_row) {
  return index_of_row(problem, q_row, problem.seqlen_q);
}
inline RowIndex index_of_k(const SelectedAttentionProblem& problem, std::int64_t k_row) {
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
