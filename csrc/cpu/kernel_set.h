// Operations on rows of scores, and the table of everything. As vector.h, for kernels_*.cpp alone.
#pragma once

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "cpu/product.h"
#include "cpu/vector.h"

namespace nsa::cpu {
namespace {

template <typename Real>
constexpr Real kInfinity = static_cast<Real>(__builtin_inf());

// v with the lanes outside [first, end) replaced.
template <typename Real>
Vector<Real> lanes_between(Vector<Real> v, std::int64_t first, std::int64_t end, Real replacement) {
  v = first_lanes<Real>(v, end, replacement);
  return first <= 0 ? v : last_lanes<Real>(v, first, replacement);
}

// [first, end), rounded to whole vectors.
template <typename Real>
struct VectorRange {
  std::int64_t first, end;
  VectorRange(std::int64_t first_column, std::int64_t end_column)
      : first(first_column / kLanes<Real> * kLanes<Real>),
        end((end_column + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>) {}
};

// Zeros in the columns [0, columns) that `vectors` leaves out.
template <typename Real>
void clear_outside(Real* row, VectorRange<Real> vectors, std::int64_t columns) {
  for (std::int64_t i = 0; i < vectors.first; ++i) row[i] = 0;
  for (std::int64_t i = vectors.end; i < columns; ++i) row[i] = 0;
}

template <typename Real>
void softmax_row(const SoftmaxStep<Real>& step, std::int64_t row) {
  constexpr int kStep = kLanes<Real>;
  Real* const scores = step.scores + row * step.scores_row;
  const std::int64_t first = step.first ? step.first[row] : 0, end = step.end ? step.end[row] : step.columns;
  if (first >= end) return clear_outside<Real>(scores, {0, 0}, step.columns);
  const VectorRange<Real> vectors(first, end);
  Vector<Real> highest = broadcast(-kInfinity<Real>);
  for (std::int64_t i = vectors.first; i < vectors.end; i += kStep) {
    const Vector<Real> scaled = load_vector(scores + i) * step.scale;
    const Vector<Real> x = lanes_between<Real>(scaled, first - i, end - i, -kInfinity<Real>);
    store_vector(scores + i, x);
    highest = x > highest ? x : highest;
  }
  const Real before = step.row_max[row];
  const Real row_highest = max_of_lanes<Real>(highest);
  const Real now = row_highest > before ? row_highest : before;
  Vector<Real> sum = {};
  for (std::int64_t i = vectors.first; i < vectors.end; i += kStep) {
    const Vector<Real> p = exp<Real>(load_vector(scores + i) - now);
    store_vector(scores + i, p);
    sum += p;
  }
  clear_outside(scores, vectors, step.columns);
  step.row_max[row] = now;
  if (now == before) {
    step.row_sum[row] += sum_of_lanes<Real>(sum);
    return;
  }
  const Real shrink = exp<Real>(broadcast(before - now))[0];
  step.row_sum[row] = step.row_sum[row] * shrink + sum_of_lanes<Real>(sum);
  Real* const o = step.o + row * step.o_row;
  for (std::int64_t i = 0; i < step.o_columns; i += kStep) store_vector(o + i, load_vector(o + i) * shrink);
}

template <typename Real>
void softmax_step(const SoftmaxStep<Real>& step) {
  for (std::int64_t row = 0; row < step.rows; ++row) softmax_row(step, row);
}

template <typename Real>
void score_gradients(const ScoreGradients<Real>& g) {
  constexpr int kStep = kLanes<Real>;
  for (std::int64_t row = 0; row < g.rows; ++row) {
    Real* const s = g.s + row * g.row_stride;
    Real* const dp = g.dp ? g.dp + row * g.row_stride : nullptr;
    const Real lse = g.lse[row], delta = g.delta[row], gate = g.gate[row];
    const std::int64_t first = g.first ? g.first[row] : 0, end = g.end[row];
    const VectorRange<Real> vectors = first < end ? VectorRange<Real>(first, end) : VectorRange<Real>(0, 0);
    for (std::int64_t i = vectors.first; i < vectors.end; i += kStep) {
      const Vector<Real> weight = gate * exp<Real>(load_vector(s + i) * g.scale - lse);
      const Vector<Real> p = lanes_between<Real>(weight, first - i, end - i, 0);
      store_vector(s + i, p);
      if (!dp) continue;
      const Vector<Real> ds = p * (load_vector(dp + i) - delta) * g.scale;
      store_vector(dp + i, lanes_between<Real>(ds, first - i, end - i, 0));
    }
    clear_outside(s, vectors, g.columns);
    if (dp) clear_outside(dp, vectors, g.columns);
  }
}

template <typename Real>
void group_mass(const GroupMass<Real>& g) {
  constexpr int kStep = kLanes<Real>;
  for (std::int64_t query = 0; query < g.queries; ++query) {
    Real* const mass = g.mass + query * g.mass_row;
    const VectorRange<Real> vectors(0, g.end[query]);
    for (std::int64_t i = 0; i < vectors.end; i += kStep) {
      Vector<Real> sum = {};
      for (std::int64_t row = query * g.group; row < (query + 1) * g.group; ++row) {
        const Real lse = g.lse[row];
        if (lse == -kInfinity<Real>) continue;
        sum += exp<Real>(load_vector(g.scores + row * g.scores_row + i) * g.scale - lse);
      }
      store_vector(mass + i, first_lanes<Real>(sum, g.end[query] - i, 0));
    }
    clear_outside(mass, vectors, g.columns);
  }
}

template <typename Real>
constexpr Kernels<Real> make_kernels(const char* instruction_set) {
  return {.instruction_set = instruction_set,
          .multiply = multiply<Real>,
          .softmax_step = softmax_step<Real>,
          .score_gradients = score_gradients<Real>,
          .group_mass = group_mass<Real>,
          .load = load_elements,
          .store = store_elements};
}

constexpr KernelSet make_kernel_set(const char* instruction_set) {
  return {make_kernels<float>(instruction_set), make_kernels<double>(instruction_set)};
}

}  // namespace
}  // namespace nsa::cpu
