// What one thread needs to treat rows of queries (those of one kv head) against chunks of their keys; forward and dQ.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/packed_keys.h"
#include "cpu/parallel.h"

namespace nsa::cpu {

// Keys per chunk: scores [rows, chunk] of 32 KiB (float) stay in the caches while they pass from product to softmax to
// product.
inline std::int64_t keys_per_chunk(std::int64_t rows) {
  return std::clamp<std::int64_t>(8192 / rows / kPanelKeys * kPanelKeys, kPanelKeys, 512);
}

template <typename Real>
struct QueryScratch {
  std::int64_t chunk = 0;                            // keys
  std::int64_t q_row = 0, o_row = 0, score_row = 0;  // row strides
  Real* q = nullptr;                                 // [rows, Dk]
  Real* d_out = nullptr;                             // [rows, Dv]
  Real* sum_q = nullptr;                             // [rows, Dk] dQ
  Real* sum_o = nullptr;                             // [rows, Dv] o
  Real* scores = nullptr;                            // [rows, chunk] S, then P
  Real* d_scores = nullptr;                          // [rows, chunk] dP, then dS
  Real* row_max = nullptr;                           // [rows]; forward
  Real* row_sum = nullptr;                           // [rows]; forward
  Real *lse = nullptr, *gate = nullptr;              // [rows]; backward
  std::int64_t* first = nullptr;                     // [rows] columns of the chunk that a row sees
  std::int64_t* end = nullptr;                       // [rows]
  KeyPiece* pieces = nullptr;                        // [chunk]

  template <typename Problem>
  static QueryScratch carve(const Problem& problem, std::int64_t rows, bool backward, Carver& carver) {
    QueryScratch s;
    s.chunk = keys_per_chunk(rows);
    s.q_row = padded<Real>(problem.head_dim_qk);
    s.o_row = padded<Real>(problem.head_dim_v);
    // One vector more: scores of a chunk's last piece are written in whole vectors.
    s.score_row = s.chunk + padded<Real>(1);
    s.q = carver.take<Real>(rows * s.q_row);
    s.scores = carver.take<Real>(rows * s.score_row);
    s.pieces = carver.take<KeyPiece>(s.chunk);
    s.first = carver.take<std::int64_t>(rows);
    s.end = carver.take<std::int64_t>(rows);
    if (backward) {
      s.lse = carver.take<Real>(rows);
      s.gate = carver.take<Real>(rows);
      s.d_out = carver.take<Real>(rows * s.o_row);
      s.sum_q = carver.take<Real>(rows * s.q_row);
      s.d_scores = carver.take<Real>(rows * s.score_row);
    } else {
      s.row_max = carver.take<Real>(rows);
      s.row_sum = carver.take<Real>(rows);
      s.sum_o = carver.take<Real>(rows * s.o_row);
    }
    return s;
  }
};

// One thread's share of the workspace where it treats the G rows of one query at a time.
template <typename Real>
std::size_t bytes_of_scratch(const SelectedAttentionProblem& problem, bool backward) {
  Carver carver(nullptr);
  QueryScratch<Real>::carve(problem, problem.num_heads_q / problem.num_heads_k, backward, carver);
  return carver.used();
}

// Calls body(q row, kv head, scratch) for all of them. scratch: num_threads * bytes_of_scratch bytes.
template <typename Real, typename Body>
void for_queries(const SelectedAttentionProblem& problem, std::int64_t total_q, bool backward, int num_threads,
                 char* scratch, const Body& body) {
  constexpr std::int64_t kRowsPerPiece = 16;
  const std::size_t thread_bytes = bytes_of_scratch<Real>(problem, backward);
  const std::int64_t pieces = (total_q + kRowsPerPiece - 1) / kRowsPerPiece;
  // Head by head, so that the queries at work share K and V in the caches.
  parallel_for(num_threads, pieces * problem.num_heads_k, 1, [&](int thread, std::int64_t piece, std::int64_t) {
    Carver own(scratch + static_cast<std::size_t>(thread) * thread_bytes);
    const auto mine = QueryScratch<Real>::carve(problem, problem.num_heads_q / problem.num_heads_k, backward, own);
    const std::int64_t begin = piece % pieces * kRowsPerPiece;
    const std::int64_t end = std::min(begin + kRowsPerPiece, total_q);
    for (std::int64_t q_row = begin; q_row < end; ++q_row) body(q_row, piece / pieces, mine);
  });
}

// scores [rows, the pieces' columns] = a [rows, D] times the keys of the pieces, transposed.
template <typename Real>
void multiply_by_columns(const Kernels<Real>& kernel, std::int64_t rows, const Real* a, std::int64_t a_row,
                         const KeyColumns<Real>& keys, std::int64_t head, const KeyPiece* pieces,
                         std::int64_t num_pieces, Real* scores, std::int64_t score_row) {
  // Ascending columns: what a piece writes past its end, the next one overwrites.
  for (std::int64_t i = 0; i < num_pieces; ++i) {
    kernel.multiply({.rows = rows,
                     .columns = pieces[i].count,
                     .depth = keys.dim,
                     .a = a,
                     .a_row = a_row,
                     .b = keys.at(head, pieces[i].first),
                     .b_depth = kPanelKeys,
                     .c = scores + pieces[i].column,
                     .c_row = score_row});
  }
}

// sum [rows, D] += weights [rows, the pieces' columns] times the keys of the pieces.
template <typename Real>
void multiply_by_rows(const Kernels<Real>& kernel, std::int64_t rows, const Real* weights, std::int64_t weight_row,
                      const KeyRows<Real>& keys, std::int64_t head, const KeyPiece* pieces, std::int64_t num_pieces,
                      Real* sum, std::int64_t sum_row) {
  for (std::int64_t i = 0; i < num_pieces; ++i) {
    kernel.multiply({.rows = rows,
                     .columns = keys.dim,
                     .depth = pieces[i].count,
                     .a = weights + pieces[i].column,
                     .a_row = weight_row,
                     .b = keys.at(head, pieces[i].first),
                     .b_depth = keys.row_stride,
                     .c = sum,
                     .c_row = sum_row,
                     .accumulate = true});
  }
}

}  // namespace nsa::cpu
