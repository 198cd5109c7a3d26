// o = softmax(scale Q K^T over the visible keys) V and lse, one query (times the G heads of one kv head) at a time.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/block_lists.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/packed_keys.h"
#include "cpu/parallel.h"
#include "cpu/query_scratch.h"
#include "cpu/sequences.h"

namespace nsa::cpu {
namespace {

template <typename Real>
struct Forward {
  const SelectedAttentionForward& args;
  const SelectedAttentionProblem& problem;
  Sequences sequences;
  BlockLists lists;
  UsedPanels used;
  KeyColumns<Real> k;  // [Hkv, panels, Dk, 64]
  KeyRows<Real> v;     // [Hkv, total_k, Dv]
};

template <typename Real>
Forward<Real> carve_forward(const SelectedAttentionForward& args, Carver& carver) {
  const SelectedAttentionProblem& p = args.problem;
  const Sequences sequences = carve_sequences(p, carver);
  return {args,
          p,
          sequences,
          carve_block_lists(p, sequences, carver),
          carve_used_panels(p, sequences, carver),
          carve_key_columns<Real>(p.num_heads_k, p.head_dim_qk, sequences, carver),
          carve_key_rows<Real>(p.num_heads_k, p.head_dim_v, sequences, carver)};
}

template <typename Real>
void write_dead_row(const Forward<Real>& f, RowIndex index, std::int64_t head_q, const QueryScratch<Real>& s) {
  std::fill(s.sum_o, s.sum_o + s.o_row, Real{0});
  kernels<Real>().store(f.problem.dtype, s.sum_o, f.problem.head_dim_v,
                        address_of(f.args.o, f.problem.dtype, index, head_q));
  if (f.args.lse.data == nullptr) return;
  static_cast<Real*>(f.args.lse.data)[offset_of(f.args.lse, index, head_q)] = -std::numeric_limits<Real>::infinity();
}

// o [G, Dv] and lse [G] of one query and kv head.
template <typename Real>
void attend(const Forward<Real>& f, std::int64_t q_row, std::int64_t head, const QueryScratch<Real>& s) {
  const Kernels<Real>& kernel = kernels<Real>();
  const SelectedAttentionProblem& p = f.problem;
  const std::int64_t group = p.num_heads_q / p.num_heads_k;
  const RowIndex index = index_of_q(p, q_row);
  if (f.lists.count(q_row, head) == 0) {
    for (std::int64_t g = 0; g < group; ++g) write_dead_row(f, index, head * group + g, s);
    return;
  }
  for (std::int64_t g = 0; g < group; ++g) {
    kernel.load(p.dtype, address_of(f.args.q, p.dtype, index, head * group + g), p.head_dim_qk, s.q + g * s.q_row);
    s.row_max[g] = -std::numeric_limits<Real>::infinity();
    s.row_sum[g] = 0;
  }
  std::fill(s.sum_o, s.sum_o + group * s.o_row, Real{0});

  const QueryPlace place = place_query(p, f.sequences, q_row);
  KeyWalk walk(f.lists.begin(q_row, head), f.lists.end(q_row, head), place.keys, p.block_size);
  std::int64_t num_pieces;
  while (const std::int64_t columns = walk.next(s.chunk, s.pieces, &num_pieces)) {
    multiply_by_columns(kernel, group, s.q, s.q_row, f.k, head, s.pieces, num_pieces, s.scores, s.score_row);
    kernel.softmax_step({.rows = group,
                         .columns = columns,
                         .scale = static_cast<Real>(p.softmax_scale),
                         .scores = s.scores,
                         .scores_row = s.score_row,
                         .row_max = s.row_max,
                         .row_sum = s.row_sum,
                         .o = s.sum_o,
                         .o_columns = p.head_dim_v,
                         .o_row = s.o_row});
    multiply_by_rows(kernel, group, s.scores, s.score_row, f.v, head, s.pieces, num_pieces, s.sum_o, s.o_row);
  }
  for (std::int64_t g = 0; g < group; ++g) {
    Real* const o = s.sum_o + g * s.o_row;
    const Real inverse = 1 / s.row_sum[g];
    for (std::int64_t d = 0; d < p.head_dim_v; ++d) o[d] *= inverse;
    kernel.store(p.dtype, o, p.head_dim_v, address_of(f.args.o, p.dtype, index, head * group + g));
    if (f.args.lse.data == nullptr) continue;
    static_cast<Real*>(f.args.lse.data)[offset_of(f.args.lse, index, head * group + g)] =
        s.row_max[g] + std::log(s.row_sum[g]);
  }
}

template <typename Real>
std::size_t forward_workspace(const SelectedAttentionForward& args) {
  Carver carver(nullptr);
  carve_forward<Real>(args, carver);
  const auto threads = static_cast<std::size_t>(resolve_threads(args.num_threads));
  return carver.used() + threads * bytes_of_scratch<Real>(args.problem, false);
}

template <typename Real>
void run_forward(const SelectedAttentionForward& args) {
  const int num_threads = resolve_threads(args.num_threads);
  Carver carver(args.workspace);
  const Forward<Real> f = carve_forward<Real>(args, carver);
  char* const scratch = carver.take<char>(0);
  fill_sequences(f.problem, f.sequences);
  fill_block_lists(f.problem, f.sequences, f.lists, num_threads);
  fill_used_panels(f.problem, f.sequences, f.lists, f.used, num_threads);
  pack_keys<Real>(f.problem, f.sequences, f.used, args.k, f.k, {}, num_threads);
  pack_keys<Real>(f.problem, f.sequences, f.used, args.v, {}, f.v, num_threads);
  for_queries<Real>(
      f.problem, f.sequences.total_q, false, num_threads, scratch,
      [&](std::int64_t q_row, std::int64_t head, const QueryScratch<Real>& s) { attend(f, q_row, head, s); });
}

}  // namespace

std::size_t workspace_bytes(const SelectedAttentionForward& args) {
  return args.problem.dtype == Dtype::kFloat64 ? forward_workspace<double>(args) : forward_workspace<float>(args);
}

void selected_attention(const SelectedAttentionForward& args) {
  if (args.problem.dtype == Dtype::kFloat64) {
    run_forward<double>(args);
  } else {
    run_forward<float>(args);
  }
}

}  // namespace nsa::cpu
