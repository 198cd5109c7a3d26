#include "cpu/range_backward.h"

#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/range_tile.h"

namespace nsa::cpu {
namespace {

template <typename Real>
RangeBackward<Real> carve_backward(const RangeAttentionBackward& args, Carver& carver) {
  const RangeAttentionProblem& p = args.problem;
  RangeBackward<Real> b{.args = args, .problem = p, .num_threads = resolve_threads(args.num_threads)};
  b.ranges = carve_ranges(p, carver);
  b.pieces = carve_range_pieces(p, b.ranges, carver);
  b.k = carve_key_columns<Real>(p.num_heads_k, p.head_dim_qk, b.ranges, carver);
  if (b.need_dq() || b.need_dk()) b.v = carve_key_columns<Real>(p.num_heads_k, p.head_dim_v, b.ranges, carver);
  if (b.need_dq()) b.k_rows = carve_key_rows<Real>(p.num_heads_k, p.head_dim_qk, b.ranges, carver);
  const std::int64_t sums = p.num_heads_k * b.pieces.max_sums;
  if (b.need_dk()) b.dk_sums = carver.take<Real>(sums * padded<Real>(p.head_dim_qk));
  if (b.need_dv()) b.dv_sums = carver.take<Real>(sums * padded<Real>(p.head_dim_v));
  return b;
}

template <typename Real>
struct Scratch {
  QueryScratch<Real> tile;
  Real* o;      // [rows, Dv]
  Real* delta;  // [rows]

  static Scratch carve(const RangeAttentionProblem& problem, const Ranges& ranges, Carver& carver) {
    const std::int64_t rows = rows_per_tile(problem, ranges);
    const auto tile = QueryScratch<Real>::carve(problem, rows, true, carver);
    // o and delta are operands of products of one column, which touch whole vectors.
    Real* const o = carver.take<Real>(rows * tile.o_row + kAlignment);
    return {tile, o, carver.take<Real>(rows + padded<Real>(1))};
  }
};

template <typename Real>
std::size_t scratch_bytes(const RangeAttentionProblem& problem, const Ranges& ranges) {
  Carver tile(nullptr), sums(nullptr);
  Scratch<Real>::carve(problem, ranges, tile);
  sums.take<Real>(padded<Real>(problem.head_dim_qk) + padded<Real>(problem.head_dim_v));
  return std::max(tile.used(), sums.used());
}

// lse, gate and delta = rowsum(dO o) - dlse of the tile's rows; 0 for dead ones. A product of one row and one column
// adds up in the order that dP's do: where one key has all the weight (o = v), dP - delta is dlse without a rounding
// error.
template <typename Real>
void load_row_statistics(const RangeBackward<Real>& b, const RangeTile& tile, const Scratch<Real>& s) {
  const RangeAttentionBackward& args = b.args;
  if (!args.delta.data) load_rows(tile, args.o, b.problem.head_dim_v, s.o, s.tile.o_row);
  for (std::int64_t row = 0; row < tile.rows(); ++row) {
    const RowIndex index = tile.index(row);
    const std::int64_t head_q = tile.head_q(row);
    const KeyRange seen = tile.keys(row);
    s.tile.lse[row] = s.tile.gate[row] = s.delta[row] = 0;
    if (seen.begin == seen.end) continue;
    s.tile.lse[row] = static_cast<const Real*>(args.lse.data)[offset_of(args.lse, index, head_q)];
    s.tile.gate[row] = gate_of<Real>(args, index, head_q);
    if (args.delta.data) {
      s.delta[row] = static_cast<const Real*>(args.delta.data)[offset_of(args.delta, index, head_q)];
    } else {
      kernels<Real>().multiply({.rows = 1,
                                .columns = 1,
                                .depth = b.problem.head_dim_v,
                                .a = s.tile.d_out + row * s.tile.o_row,
                                .b = s.o + row * s.tile.o_row,
                                .b_depth = 1,
                                .c = s.delta + row,
                                .c_row = 1});
    }
    if (args.dlse.data) s.delta[row] -= static_cast<const Real*>(args.dlse.data)[offset_of(args.dlse, index, head_q)];
  }
}

// sums [columns, dim] += weights^T [columns, rows] x [rows, dim]
template <typename Real>
void add_transposed(std::int64_t columns, std::int64_t rows, const Real* weights, std::int64_t weight_row,
                    const Real* x, std::int64_t dim, Real* sums) {
  const std::int64_t stride = padded<Real>(dim);
  kernels<Real>().multiply({.rows = columns,
                            .columns = dim,
                            .depth = rows,
                            .a = weights,
                            .a_row = 1,
                            .a_depth = weight_row,
                            .b = x,
                            .b_depth = stride,
                            .c = sums,
                            .c_row = stride,
                            .accumulate = true});
}

// dq of one tile; its share of dk and dv goes to the piece's sums.
template <typename Real>
void differentiate(const RangeBackward<Real>& b, const RangePiece& piece, const RangeTile& tile,
                   const Scratch<Real>& scratch) {
  const Kernels<Real>& kernel = kernels<Real>();
  const RangeAttentionProblem& p = b.problem;
  const QueryScratch<Real>& s = scratch.tile;
  const std::int64_t rows = tile.rows();
  const bool need_ds = b.need_dq() || b.need_dk();
  load_rows(tile, b.args.q, p.head_dim_qk, s.q, s.q_row);
  load_rows(tile, b.args.dout, p.head_dim_v, s.d_out, s.o_row);
  load_row_statistics(b, tile, scratch);
  std::fill(s.sum_q, s.sum_q + rows * s.q_row, Real{0});
  for (std::int64_t row = 0; b.need_dq() && b.args.accumulate_dq && row < rows; ++row) {
    kernel.load(p.dtype, address_of(b.args.dq, p.dtype, tile.index(row), tile.head_q(row)), p.head_dim_qk,
                s.sum_q + row * s.q_row);
  }
  RangeWalk walk(tile.keys());
  std::int64_t num_pieces;
  while (const std::int64_t columns = walk.next(s.chunk, s.pieces, &num_pieces)) {
    multiply_by_columns(kernel, rows, s.q, s.q_row, b.k, tile.head, s.pieces, num_pieces, s.scores, s.score_row);
    if (need_ds) {
      multiply_by_columns(kernel, rows, s.d_out, s.o_row, b.v, tile.head, s.pieces, num_pieces, s.d_scores,
                          s.score_row);
    }
    tile.columns_of_chunk(walk.first(), columns, s.first, s.end);
    kernel.score_gradients({.rows = rows,
                            .columns = columns,
                            .scale = static_cast<Real>(p.softmax_scale),
                            .s = s.scores,
                            .dp = need_ds ? s.d_scores : nullptr,
                            .row_stride = s.score_row,
                            .lse = s.lse,
                            .delta = scratch.delta,
                            .gate = s.gate,
                            .first = s.first,
                            .end = s.end});
    const KeyPiece whole{walk.first(), columns, 0};
    if (b.need_dq()) {
      multiply_by_rows(kernel, rows, s.d_scores, s.score_row, b.k_rows, tile.head, &whole, 1, s.sum_q, s.q_row);
    }
    const std::int64_t sum = piece.first_sum + walk.first() - piece.keys.begin;
    if (b.need_dk()) {
      add_transposed(columns, rows, s.d_scores, s.score_row, s.q, p.head_dim_qk, b.dk_sum(tile.head, sum));
    }
    if (b.need_dv()) {
      add_transposed(columns, rows, s.scores, s.score_row, s.d_out, p.head_dim_v, b.dv_sum(tile.head, sum));
    }
  }
  for (std::int64_t row = 0; b.need_dq() && row < rows; ++row) {
    kernel.store(p.dtype, s.sum_q + row * s.q_row, p.head_dim_qk,
                 address_of(b.args.dq, p.dtype, tile.index(row), tile.head_q(row)));
  }
}

template <typename Real>
void run_piece(const RangeBackward<Real>& b, const RangePiece& piece, std::int64_t head, const Scratch<Real>& scratch) {
  const std::int64_t keys = piece.keys.end - piece.keys.begin;
  if (b.need_dk()) {
    Real* const sums = b.dk_sum(head, piece.first_sum);
    std::fill(sums, sums + keys * scratch.tile.q_row, Real{0});
  }
  if (b.need_dv()) {
    Real* const sums = b.dv_sum(head, piece.first_sum);
    std::fill(sums, sums + keys * scratch.tile.o_row, Real{0});
  }
  const RangeSequence& sequence = b.ranges.sequences[piece.sequence];
  for (std::int64_t begin = piece.begin; begin < piece.end; begin += b.ranges.tile_queries) {
    const std::int64_t end = std::min(begin + b.ranges.tile_queries, piece.end);
    differentiate(b, piece, {b.problem, sequence, begin, end, head}, scratch);
  }
}

// Rows outside every sequence are dead.
template <typename Real>
void clear_outside_queries(const RangeBackward<Real>& b, const Scratch<Real>& scratch) {
  const RangeAttentionProblem& p = b.problem;
  Real* const zeros = scratch.tile.sum_q;
  std::fill(zeros, zeros + scratch.tile.q_row, Real{0});
  for_outside_rows(b.ranges.q_begin, b.ranges.batch, b.ranges.total_q, [&](std::int64_t q_row) {
    for (std::int64_t head_q = 0; head_q < p.num_heads_q; ++head_q) {
      kernels<Real>().store(p.dtype, zeros, p.head_dim_qk,
                            address_of(b.args.dq, p.dtype, index_of_q(p, q_row), head_q));
    }
  });
}

template <typename Real>
std::size_t backward_workspace(const RangeAttentionBackward& args) {
  Carver carver(nullptr);
  const RangeBackward<Real> b = carve_backward<Real>(args, carver);
  return carver.used() + static_cast<std::size_t>(b.num_threads) * scratch_bytes<Real>(args.problem, b.ranges);
}

template <typename Real>
void run_backward(const RangeAttentionBackward& args) {
  Carver carver(args.workspace);
  const RangeBackward<Real> b = carve_backward<Real>(args, carver);
  char* const scratch = carver.take<char>(0);
  const std::size_t bytes = scratch_bytes<Real>(b.problem, b.ranges);
  const auto scratch_of = [&](int thread) {
    Carver own(scratch + static_cast<std::size_t>(thread) * bytes);
    return Scratch<Real>::carve(b.problem, b.ranges, own);
  };
  fill_ranges(b.problem, b.ranges);
  fill_range_pieces(b.problem, b.ranges, b.pieces);
  pack_ranges<Real>(b.problem, b.ranges, args.k, b.k, b.k_rows, b.num_threads);
  if (b.v.data != nullptr) pack_ranges<Real>(b.problem, b.ranges, args.v, b.v, {}, b.num_threads);
  if (b.need_dq() && !args.accumulate_dq) clear_outside_queries(b, scratch_of(0));
  // The last pieces of a causal mask see the most keys: they go first.
  const std::int64_t count = b.pieces.piece_begin[b.ranges.batch];
  parallel_for(b.num_threads, count * b.problem.num_heads_k, 1, [&](int thread, std::int64_t i, std::int64_t) {
    run_piece(b, b.pieces.pieces[count - 1 - i / b.problem.num_heads_k], i % b.problem.num_heads_k, scratch_of(thread));
  });
  if (b.need_dk() || b.need_dv()) add_range_pieces(b, reinterpret_cast<Real*>(scratch));
}

}  // namespace

std::size_t workspace_bytes(const RangeAttentionBackward& args) {
  return args.problem.dtype == Dtype::kFloat64 ? backward_workspace<double>(args) : backward_workspace<float>(args);
}

void range_attention(const RangeAttentionBackward& args) {
  if (args.problem.dtype == Dtype::kFloat64) {
    run_backward<double>(args);
  } else {
    run_backward<float>(args);
  }
}

}  // namespace nsa::cpu
