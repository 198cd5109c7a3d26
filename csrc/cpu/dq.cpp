// dQ = dS K, one query (times the G heads of one kv head) at a time, as the forward goes.
#include <algorithm>

#include "cpu/backward.h"
#include "cpu/parallel.h"
#include "cpu/query_scratch.h"

namespace nsa::cpu {
namespace {

// dq [G, Dk] of one query and kv head.
template <typename Real>
void differentiate(const Backward<Real>& b, std::int64_t q_row, std::int64_t head, const QueryScratch<Real>& s) {
  const Kernels<Real>& kernel = kernels<Real>();
  const SelectedAttentionProblem& p = b.problem;
  const std::int64_t group = b.group();
  const RowIndex row = index_of_q(p, q_row);
  for (std::int64_t g = 0; g < group; ++g) {
    Real* const sum = s.sum_q + g * s.q_row;
    std::fill(sum, sum + s.q_row, Real{0});
    if (b.args.accumulate_dq) {
      kernel.load(p.dtype, address_of(b.args.dq, p.dtype, row, head * group + g), p.head_dim_qk, sum);
    }
  }
  if (b.lists.count(q_row, head) > 0) {
    for (std::int64_t g = 0; g < group; ++g) {
      const std::int64_t head_q = head * group + g;
      kernel.load(p.dtype, address_of(b.args.q, p.dtype, row, head_q), p.head_dim_qk, s.q + g * s.q_row);
      kernel.load(p.dtype, address_of(b.args.dout, p.dtype, row, head_q), p.head_dim_v, s.d_out + g * s.o_row);
      s.lse[g] = b.lse(row, head_q);
      s.gate[g] = gate_of<Real>(b.args, row, head_q);
    }
    const Real* const delta = b.delta + q_row * p.num_heads_q + head * group;
    const QueryPlace place = place_query(p, b.sequences, q_row);
    KeyWalk walk(b.lists.begin(q_row, head), b.lists.end(q_row, head), place.keys, p.block_size);
    std::int64_t num_pieces;
    while (const std::int64_t columns = walk.next(s.chunk, s.pieces, &num_pieces)) {
      multiply_by_columns(kernel, group, s.q, s.q_row, b.k, head, s.pieces, num_pieces, s.scores, s.score_row);
      multiply_by_columns(kernel, group, s.d_out, s.o_row, b.v, head, s.pieces, num_pieces, s.d_scores, s.score_row);
      std::fill(s.end, s.end + group, columns);
      kernel.score_gradients({.rows = group,
                              .columns = columns,
                              .scale = static_cast<Real>(p.softmax_scale),
                              .s = s.scores,
                              .dp = s.d_scores,
                              .row_stride = s.score_row,
                              .lse = s.lse,
                              .delta = delta,
                              .gate = s.gate,
                              .end = s.end});
      multiply_by_rows(kernel, group, s.d_scores, s.score_row, b.k_rows, head, s.pieces, num_pieces, s.sum_q, s.q_row);
    }
  }
  for (std::int64_t g = 0; g < group; ++g) {
    kernel.store(p.dtype, s.sum_q + g * s.q_row, p.head_dim_qk, address_of(b.args.dq, p.dtype, row, head * group + g));
  }
}

}  // namespace

template <typename Real>
std::size_t dq_scratch_bytes(const SelectedAttentionProblem& problem) {
  return bytes_of_scratch<Real>(problem, true);
}

template <typename Real>
void compute_dq(const Backward<Real>& b, char* scratch) {
  for_queries<Real>(
      b.problem, b.sequences.total_q, true, b.num_threads, scratch,
      [&](std::int64_t q_row, std::int64_t head, const QueryScratch<Real>& s) { differentiate(b, q_row, head, s); });
}

template std::size_t dq_scratch_bytes<float>(const SelectedAttentionProblem&);
template std::size_t dq_scratch_bytes<double>(const SelectedAttentionProblem&);
template void compute_dq(const Backward<float>&, char*);
template void compute_dq(const Backward<double>&, char*);

}  // namespace nsa::cpu
