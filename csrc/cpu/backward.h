// What the passes of the backward share. With P = gate exp(scale Q K^T - lse), dP = dO V^T and delta = rowsum(dO o) -
// dlse (one of gate and dlse is absent):
//   dS = scale P (dP - delta),   dQ = dS K,   dK = dS^T Q,   dV = P^T dO.
#pragma once

#include "cpu/block_lists.h"
#include "cpu/gates.h"
#include "cpu/inverted_index.h"
#include "cpu/kernels.h"
#include "cpu/packed_keys.h"
#include "cpu/sequences.h"

namespace nsa::cpu {

template <typename Real>
struct Backward {
  const SelectedAttentionBackward& args;
  const SelectedAttentionProblem& problem;
  int num_threads = 1;
  Sequences sequences = {};
  BlockLists lists = {};
  UsedPanels used = {};
  InvertedIndex index = {};         // dK, dV
  KeyColumns<Real> k = {}, v = {};  // [Hkv, panels, Dk | Dv, 64]; v: for dQ and dK
  KeyRows<Real> k_rows = {};        // [Hkv, total_k, Dk]; for dQ
  Real* delta = nullptr;            // [total_q, Hq]; only live rows are filled
  Real* partial = nullptr;          // [index.max_split_segments, keys_per_split, Dk + Dv (padded)]
  std::int64_t keys_per_split = 0;  // l'

  std::int64_t group() const { return problem.num_heads_q / problem.num_heads_k; }
  Real lse(RowIndex row, std::int64_t head_q) const {
    return static_cast<const Real*>(args.lse.data)[offset_of(args.lse, row, head_q)];
  }
};

// Bytes of scratch of one thread.
template <typename Real>
std::size_t dq_scratch_bytes(const SelectedAttentionProblem& problem);
template <typename Real>
std::size_t dkdv_scratch_bytes(const SelectedAttentionProblem& problem);

// scratch: num_threads times as much.
template <typename Real>
void compute_dq(const Backward<Real>& b, char* scratch);
template <typename Real>
void compute_dkdv(const Backward<Real>& b, char* scratch);

}  // namespace nsa::cpu
