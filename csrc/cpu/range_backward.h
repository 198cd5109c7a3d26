// What the passes of range attention's backward share. dQ, dK and dV come from one pass over tiles of queries:
//   dS = scale P (dP - delta),   dQ = dS K,   dK += dS^T Q,   dV += P^T dO.
// The queries are cut into pieces, a number that depends on sizes alone; each piece adds up dK and dV of its own for
// the keys that it sees, one tile after the other, and the pieces' sums are added in ascending order afterwards.
#pragma once

#include "cpu/gates.h"
#include "cpu/kernels.h"
#include "cpu/packed_keys.h"
#include "cpu/ranges.h"

namespace nsa::cpu {

// A run of queries of one sequence, and where its sums stand.
struct RangePiece {
  std::int64_t sequence = 0;
  std::int64_t begin = 0, end = 0;  // queries
  KeyRange keys;                    // k rows that they see
  std::int64_t first_sum = 0;       // row of partial sums that holds keys.begin
};

struct RangePieces {
  std::int64_t max_count = 0, max_sums = 0;  // of one kv head
  RangePiece* pieces = nullptr;              // [max_count] in the order of their queries
  std::int64_t* piece_begin = nullptr;       // [B + 1] first piece of each sequence
};

RangePieces carve_range_pieces(const RangeAttentionProblem& problem, const Ranges& ranges, Carver& carver);
void fill_range_pieces(const RangeAttentionProblem& problem, const Ranges& ranges, const RangePieces& pieces);

template <typename Real>
struct RangeBackward {
  const RangeAttentionBackward& args;
  const RangeAttentionProblem& problem;
  int num_threads = 1;
  Ranges ranges = {};
  RangePieces pieces = {};
  KeyColumns<Real> k = {}, v = {};              // [Hkv, panels, Dk | Dv, 64]; v: for dQ and dK
  KeyRows<Real> k_rows = {};                    // [Hkv, total_k, Dk]; for dQ
  Real *dk_sums = nullptr, *dv_sums = nullptr;  // [Hkv, max_sums, Dk | Dv (padded)]

  bool need_dq() const { return args.dq.data != nullptr; }
  bool need_dk() const { return args.dk.data != nullptr; }
  bool need_dv() const { return args.dv.data != nullptr; }
  Real* dk_sum(std::int64_t head, std::int64_t sum) const {
    return dk_sums + (head * pieces.max_sums + sum) * padded<Real>(problem.head_dim_qk);
  }
  Real* dv_sum(std::int64_t head, std::int64_t sum) const {
    return dv_sums + (head * pieces.max_sums + sum) * padded<Real>(problem.head_dim_v);
  }
};

// Adds up the pieces' sums and writes dk and dv, zeros for keys that no query sees. scratch: num_threads times
// padded(Dk) + padded(Dv) numbers.
template <typename Real>
void add_range_pieces(const RangeBackward<Real>& b, Real* scratch);

}  // namespace nsa::cpu
