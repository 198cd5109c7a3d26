// What one thread needs to treat one query (its G heads of one kv head) against chunks of its keys; forward and dQ.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/packed_keys.h"
#include "cpu/parallel.h"

namespace nsa::cpu {

// Keys per chunk: scores [G, chunk] of 32 KiB (float) stay in the caches while they pass from product to softmax to
// product.
inline std::int64_t keys_per_chunk(std::int64_t group) {
  return std::clamp<std::int64_t>(8192 / group / kPanelKeys * kPanelKeys, kPanelKeys, 512);
}

template <typename Real>
struct QueryScratch {
  std::int64_t chunk = 0;                            // keys
  std::int64_t q_row = 0, o_row = 0, score_row = 0;  // row strides
  Real* q = nullptr;                                 // [G, Dk]
  Real* d_out = nullptr;                             // [G, Dv]
  Real* sum_q = nullptr;                             // [G, Dk] dQ
  Real* sum_o = nullptr;                             // [G, Dv] o
  Real* scores = nullptr;                            // [G, chunk] S, then P
  Real* d_scores = nullptr;                          // [G, chunk] dP, then dS
  Real* row_max = nullptr;                           // [G]; forward
  Real* row_sum = nullptr;                           // [G]; forward
  Real* lse = nullptr;                               // [G]; backward
  std::int64_t* visible = nullptr;                   // [G]
  KeyPiece* pieces = nullptr;                        // [chunk]

  static QueryScratch carve(const SelectedAttentionProblem& problem, bool backward, Carver& carver) {
    const std::int64_t group = problem.num_heads_q / problem.num_heads_k;
    QueryScratch s;
    s.chunk = keys_per_chunk(group);
    s.q_row = padded<Real>(problem.head_dim_qk);
    s.o_row = padded<Real>(problem.head_dim_v);
    // One vector more: scores of a chunk's last piece are written in whole vectors.
    s.score_row = s.chunk + padded<Real>(1);
    s.q = carver.take<Real>(group * s.q_row);
    s.scores = carver.take<Real>(group * s.score_row);
    s.pieces = carver.take<KeyPiece>(s.chunk);
    if (backward) {
      s.lse = carver.take<Real>(group);
      s.d_out = carver.take<Real>(group * s.o_row);
      s.sum_q = carver.take<Real>(group * s.q_row);
      s.d_scores = carver.take<Real>(group * s.score_row);
      s.visible = carver.take<std::int64_t>(group);
    } else {
      s.row_max = carver.take<Real>(group);
      s.row_sum = carver.take<Real>(group);
      s.sum_o = carver.take<Real>(group * s.o_row);
    }
    return s;
  }
};

// One thread's share of the workspace.
template <typename Real>
std::size_t bytes_of_scratch(const SelectedAttentionProblem& problem, bool backward) {
  Carver carver(nullptr);
  QueryScratch<Real>::carve(problem, backward, carver);
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
    const auto mine = QueryScratch<Real>::carve(problem, backward, own);
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
