#include "cpu/backward.h"

#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/parallel.h"

namespace nsa::cpu {
namespace {

template <typename Real>
Backward<Real> carve_backward(const SelectedAttentionBackward& args, Carver& carver) {
  const SelectedAttentionProblem& p = args.problem;
  const bool dq = args.dq.data != nullptr, dk = args.dk.data != nullptr, dv = args.dv.data != nullptr;
  Backward<Real> b{.args = args, .problem = p, .num_threads = resolve_threads(args.num_threads)};
  b.sequences = carve_sequences(p, carver);
  b.lists = carve_block_lists(p, b.sequences, carver);
  b.used = carve_used_panels(p, b.sequences, carver);
  b.k = carve_key_columns<Real>(p.num_heads_k, p.head_dim_qk, b.sequences, carver);
  if (dq || dk) b.v = carve_key_columns<Real>(p.num_heads_k, p.head_dim_v, b.sequences, carver);
  if (dq) b.k_rows = carve_key_rows<Real>(p.num_heads_k, p.head_dim_qk, b.sequences, carver);
  b.delta = carver.take<Real>(b.sequences.total_q * p.num_heads_q);
  if (dk || dv) {
    b.index = carve_inverted_index(p, b.sequences, carver);
    b.keys_per_split = std::min(p.block_size, p.seqlen_k);
    b.partial = carver.take<Real>(b.index.max_split_segments * b.keys_per_split *
                                  (padded<Real>(p.head_dim_qk) + padded<Real>(p.head_dim_v)));
  }
  return b;
}

template <typename Real>
struct DeltaScratch {
  Real *o, *d_out;  // [Dv]
  Real* delta;      // [1]

  static DeltaScratch carve(std::int64_t dim, Carver& carver) {
    // Both o and delta are touched in whole vectors.
    Real* const o = carver.take<Real>(dim + kAlignment);
    Real* const d_out = carver.take<Real>(dim);
    return {o, d_out, carver.take<Real>(padded<Real>(1))};
  }
};

template <typename Real>
std::size_t scratch_bytes(const SelectedAttentionProblem& problem) {
  Carver delta(nullptr);
  DeltaScratch<Real>::carve(problem.head_dim_v, delta);
  return std::max({delta.used(), dq_scratch_bytes<Real>(problem), dkdv_scratch_bytes<Real>(problem)});
}

// delta [total_q, Hq] of the rows that see a key: others hold anything in do and dlse. A product of one row and one
// column adds up in the order that dP's do: where one key has all the weight (o = v), dP - delta is dlse without a
// rounding error.
template <typename Real>
void compute_delta(const Backward<Real>& b, char* scratch) {
  constexpr std::int64_t kRowsPerPiece = 64;
  const SelectedAttentionBackward& args = b.args;
  const SelectedAttentionProblem& p = b.problem;
  const Kernels<Real>& kernel = kernels<Real>();
  const std::int64_t dim = p.head_dim_v;
  const std::size_t thread_bytes = scratch_bytes<Real>(p);
  parallel_for(b.num_threads, b.sequences.total_q, kRowsPerPiece,
               [&](int thread, std::int64_t begin, std::int64_t end) {
                 Carver own(scratch + static_cast<std::size_t>(thread) * thread_bytes);
                 const auto s = DeltaScratch<Real>::carve(dim, own);
                 for (std::int64_t q_row = begin; q_row < end; ++q_row) {
                   const RowIndex row = index_of_q(p, q_row);
                   for (std::int64_t head_q = 0; head_q < p.num_heads_q; ++head_q) {
                     if (b.lists.count(q_row, head_q / b.group()) == 0) continue;
                     if (args.delta.data) {
                       *s.delta = static_cast<const Real*>(args.delta.data)[offset_of(args.delta, row, head_q)];
                     } else {
                       kernel.load(p.dtype, address_of(args.o, p.dtype, row, head_q), dim, s.o);
                       kernel.load(p.dtype, address_of(args.dout, p.dtype, row, head_q), dim, s.d_out);
                       kernel.multiply({.rows = 1,
                                        .columns = 1,
                                        .depth = dim,
                                        .a = s.d_out,
                                        .b = s.o,
                                        .b_depth = 1,
                                        .c = s.delta,
                                        .c_row = 1});
                     }
                     if (args.dlse.data)
                       *s.delta -= static_cast<const Real*>(args.dlse.data)[offset_of(args.dlse, row, head_q)];
                     b.delta[q_row * p.num_heads_q + head_q] = *s.delta;
                   }
                 }
               });
}

template <typename Real>
std::size_t backward_workspace(const SelectedAttentionBackward& args) {
  Carver carver(nullptr);
  const Backward<Real> b = carve_backward<Real>(args, carver);
  return carver.used() + static_cast<std::size_t>(b.num_threads) * scratch_bytes<Real>(args.problem);
}

template <typename Real>
void run_backward(const SelectedAttentionBackward& args) {
  Carver carver(args.workspace);
  const Backward<Real> b = carve_backward<Real>(args, carver);
  char* const scratch = carver.take<char>(0);
  fill_sequences(b.problem, b.sequences);
  fill_block_lists(b.problem, b.sequences, b.lists, b.num_threads);
  fill_used_panels(b.problem, b.sequences, b.lists, b.used, b.num_threads);
  pack_keys<Real>(b.problem, b.sequences, b.used, args.k, b.k, b.k_rows, b.num_threads);
  if (b.v.data != nullptr) pack_keys<Real>(b.problem, b.sequences, b.used, args.v, b.v, {}, b.num_threads);
  compute_delta(b, scratch);
  if (args.dq.data != nullptr) compute_dq(b, scratch);
  if (args.dk.data == nullptr && args.dv.data == nullptr) return;
  fill_inverted_index(b.problem, b.sequences, b.lists, b.index, b.num_threads);
  compute_dkdv(b, scratch);
}

}  // namespace

std::size_t workspace_bytes(const SelectedAttentionBackward& args) {
  return args.problem.dtype == Dtype::kFloat64 ? backward_workspace<double>(args) : backward_workspace<float>(args);
}

void selected_attention(const SelectedAttentionBackward& args) {
  if (args.problem.dtype == Dtype::kFloat64) {
    run_backward<double>(args);
  } else {
    run_backward<float>(args);
  }
}

}  // namespace nsa::cpu
