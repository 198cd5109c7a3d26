// o = softmax(scale Q K^T over a run of keys) V and lse, one tile of queries (times the G heads of one kv head) at a
// time.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/range_tile.h"

namespace nsa::cpu {
namespace {

template <typename Real>
struct Forward {
  const RangeAttentionForward& args;
  const RangeAttentionProblem& problem;
  Ranges ranges;
  KeyColumns<Real> k;  // [Hkv, panels, Dk, 64]
  KeyRows<Real> v;     // [Hkv, total_k, Dv]
};

template <typename Real>
Forward<Real> carve_forward(const RangeAttentionForward& args, Carver& carver) {
  const RangeAttentionProblem& p = args.problem;
  const Ranges ranges = carve_ranges(p, carver);
  return {args, p, ranges, carve_key_columns<Real>(p.num_heads_k, p.head_dim_qk, ranges, carver),
          carve_key_rows<Real>(p.num_heads_k, p.head_dim_v, ranges, carver)};
}

template <typename Real>
std::size_t tile_bytes(const RangeAttentionProblem& problem, const Ranges& ranges) {
  Carver carver(nullptr);
  QueryScratch<Real>::carve(problem, rows_per_tile(problem, ranges), false, carver);
  return carver.used();
}

template <typename Real>
void write_lse(const Forward<Real>& f, RowIndex index, std::int64_t head_q, Real lse) {
  if (f.args.lse.data != nullptr) static_cast<Real*>(f.args.lse.data)[offset_of(f.args.lse, index, head_q)] = lse;
}

// o and lse of the tile's rows.
template <typename Real>
void write_rows(const Forward<Real>& f, const RangeTile& tile, const QueryScratch<Real>& s) {
  const RangeAttentionProblem& p = f.problem;
  for (std::int64_t row = 0; row < tile.rows(); ++row) {
    Real* const o = s.sum_o + row * s.o_row;
    const KeyRange seen = tile.keys(row);
    const bool dead = seen.begin == seen.end;
    const Real inverse = dead ? Real{0} : 1 / s.row_sum[row];
    for (std::int64_t d = 0; d < p.head_dim_v; ++d) o[d] *= inverse;
    kernels<Real>().store(p.dtype, o, p.head_dim_v, address_of(f.args.o, p.dtype, tile.index(row), tile.head_q(row)));
    write_lse(f, tile.index(row), tile.head_q(row),
              dead ? -std::numeric_limits<Real>::infinity() : s.row_max[row] + std::log(s.row_sum[row]));
  }
}

template <typename Real>
void attend(const Forward<Real>& f, const RangeTile& tile, const QueryScratch<Real>& s) {
  const Kernels<Real>& kernel = kernels<Real>();
  const RangeAttentionProblem& p = f.problem;
  const std::int64_t rows = tile.rows();
  load_rows(tile, f.args.q, p.head_dim_qk, s.q, s.q_row);
  std::fill(s.row_max, s.row_max + rows, -std::numeric_limits<Real>::infinity());
  std::fill(s.row_sum, s.row_sum + rows, Real{0});
  std::fill(s.sum_o, s.sum_o + rows * s.o_row, Real{0});
  RangeWalk walk(tile.keys());
  std::int64_t num_pieces;
  while (const std::int64_t columns = walk.next(s.chunk, s.pieces, &num_pieces)) {
    multiply_by_columns(kernel, rows, s.q, s.q_row, f.k, tile.head, s.pieces, num_pieces, s.scores, s.score_row);
    tile.columns_of_chunk(walk.first(), columns, s.first, s.end);
    kernel.softmax_step({.rows = rows,
                         .columns = columns,
                         .scale = static_cast<Real>(p.softmax_scale),
                         .scores = s.scores,
                         .scores_row = s.score_row,
                         .row_max = s.row_max,
                         .row_sum = s.row_sum,
                         .o = s.sum_o,
                         .o_columns = p.head_dim_v,
                         .o_row = s.o_row,
                         .first = s.first,
                         .end = s.end});
    const KeyPiece whole{walk.first(), columns, 0};
    multiply_by_rows(kernel, rows, s.scores, s.score_row, f.v, tile.head, &whole, 1, s.sum_o, s.o_row);
  }
  write_rows(f, tile, s);
}

// Rows outside every sequence are dead.
template <typename Real>
void write_outside_rows(const Forward<Real>& f, const QueryScratch<Real>& s) {
  const RangeAttentionProblem& p = f.problem;
  std::fill(s.sum_o, s.sum_o + s.o_row, Real{0});
  for_outside_rows(f.ranges.q_begin, f.ranges.batch, f.ranges.total_q, [&](std::int64_t q_row) {
    const RowIndex index = index_of_q(p, q_row);
    for (std::int64_t head_q = 0; head_q < p.num_heads_q; ++head_q) {
      kernels<Real>().store(p.dtype, s.sum_o, p.head_dim_v, address_of(f.args.o, p.dtype, index, head_q));
      write_lse(f, index, head_q, -std::numeric_limits<Real>::infinity());
    }
  });
}

template <typename Real>
std::size_t forward_workspace(const RangeAttentionForward& args) {
  Carver carver(nullptr);
  const Forward<Real> f = carve_forward<Real>(args, carver);
  return carver.used() +
         static_cast<std::size_t>(resolve_threads(args.num_threads)) * tile_bytes<Real>(f.problem, f.ranges);
}

template <typename Real>
void run_forward(const RangeAttentionForward& args) {
  const int num_threads = resolve_threads(args.num_threads);
  Carver carver(args.workspace);
  const Forward<Real> f = carve_forward<Real>(args, carver);
  char* const scratch = carver.take<char>(0);
  fill_ranges(f.problem, f.ranges);
  pack_ranges<Real>(f.problem, f.ranges, args.k, f.k, {}, num_threads);
  pack_ranges<Real>(f.problem, f.ranges, args.v, {}, f.v, num_threads);
  const auto scratch_at = [&](char* memory) {
    Carver own(memory);
    return QueryScratch<Real>::carve(f.problem, rows_per_tile(f.problem, f.ranges), false, own);
  };
  write_outside_rows(f, scratch_at(scratch));
  for_range_tiles(f.problem, f.ranges, num_threads, scratch, tile_bytes<Real>(f.problem, f.ranges),
                  [&](const RangeTile& tile, char* memory) { attend(f, tile, scratch_at(memory)); });
}

}  // namespace

std::size_t workspace_bytes(const RangeAttentionForward& args) {
  return args.problem.dtype == Dtype::kFloat64 ? forward_workspace<double>(args) : forward_workspace<float>(args);
}

void range_attention(const RangeAttentionForward& args) {
  if (args.problem.dtype == Dtype::kFloat64) {
    run_forward<double>(args);
  } else {
    run_forward<float>(args);
  }
}

}  // namespace nsa::cpu
