// The inner loops, behind function pointers: kernels_*.cpp compile the same code once per instruction set.
//
// Real is the compute type: double for float64 tensors, float for the others. Matrices are row-major. Rows that vectors
// run along (b and c of a product, scores) may be written up to the next multiple of 64 bytes past their last column.
#pragma once

#include <cstdint>

#include "nsa_cuda/nsa.h"

namespace nsa::cpu {

// c[m, n] (+)= sum over k of a[m, k] b[k, n].
template <typename Real>
struct Product {
  std::int64_t rows = 0, columns = 0, depth = 0;  // m, n, k
  const Real* a = nullptr;                        // a[m, k] = a[m * a_row + k * a_depth]
  std::int64_t a_row = 0, a_depth = 1;
  const Real* b = nullptr;  // [k, n]
  std::int64_t b_depth = 0;
  Real* c = nullptr;  // [m, n]
  std::int64_t c_row = 0;
  bool accumulate = false;
};

// One step of an online softmax: scores [rows, columns] become exp(scale * score - new row_max), row_sum and o follow.
// A row sees the columns [first, end); the others become 0.
template <typename Real>
struct SoftmaxStep {
  std::int64_t rows = 0, columns = 0;
  Real scale = 0;
  Real* scores = nullptr;  // [rows, columns], row stride scores_row
  std::int64_t scores_row = 0;
  Real* row_max = nullptr;  // [rows], -inf before the first step
  Real* row_sum = nullptr;  // [rows], 0 before the first step
  Real* o = nullptr;        // [rows, o_columns], unnormalised: rescaled when the maximum grows
  std::int64_t o_columns = 0, o_row = 0;
  const std::int64_t *first = nullptr, *end = nullptr;  // [rows]; null: all columns
};

// P = gate * exp(scale * S - lse), dS = scale * P (dP - delta), in place of S and dP. Columns outside [first[row],
// end[row]) become 0.
template <typename Real>
struct ScoreGradients {
  std::int64_t rows = 0, columns = 0;
  Real scale = 0;
  Real* s = nullptr;   // [rows, columns] in: Q K^T; out: P
  Real* dp = nullptr;  // [rows, columns] in: dO V^T; out: dS; null: only P is wanted
  std::int64_t row_stride = 0;
  const Real* lse = nullptr;            // [rows]
  const Real* delta = nullptr;          // [rows] rowsum(dO o) - dlse
  const Real* gate = nullptr;           // [rows]
  const std::int64_t* first = nullptr;  // [rows]; null: 0
  const std::int64_t* end = nullptr;    // [rows]
};

// mass [queries, columns] = sum over the G rows g of a query, in ascending order, of exp(scale * scores - lse). Columns
// from end[query] on become 0, and a row whose lse is -inf adds 0.
template <typename Real>
struct GroupMass {
  std::int64_t queries = 0, group = 0, columns = 0;
  Real scale = 0;
  const Real* scores = nullptr;  // [queries * group, columns], row stride scores_row
  std::int64_t scores_row = 0;
  const Real* lse = nullptr;          // [queries * group]
  const std::int64_t* end = nullptr;  // [queries]
  Real* mass = nullptr;               // [queries, columns], row stride mass_row
  std::int64_t mass_row = 0;
};

template <typename Real>
struct Kernels {
  const char* instruction_set = nullptr;
  void (*multiply)(const Product<Real>&) = nullptr;
  void (*softmax_step)(const SoftmaxStep<Real>&) = nullptr;
  void (*score_gradients)(const ScoreGradients<Real>&) = nullptr;
  void (*group_mass)(const GroupMass<Real>&) = nullptr;
  // Elements of a tensor, to the compute type and back (round to nearest even).
  void (*load)(Dtype dtype, const void* source, std::int64_t count, Real* target) = nullptr;
  void (*store)(Dtype dtype, const Real* source, std::int64_t count, void* target) = nullptr;
};

// Of the best instruction set that this processor has.
template <typename Real>
const Kernels<Real>& kernels();

struct KernelSet {
  Kernels<float> of_float;
  Kernels<double> of_double;
};
extern const KernelSet kPortableKernels;
extern const KernelSet kAvx2Kernels;  // x86-64 only, as the next
extern const KernelSet kAvx512Kernels;

}  // namespace nsa::cpu
