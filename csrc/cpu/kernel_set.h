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

template <typename Real>
void softmax_row(const SoftmaxStep<Real>& step, std::int64_t row) {
  constexpr int kStep = kLanes<Real>;
  Real* const scores = step.scores + row * step.scores_row;
  Vector<Real> highest = broadcast(-kInfinity<Real>);
  for (std::int64_t i = 0; i < step.columns; i += kStep) {
    const Vector<Real> x = first_lanes<Real>(load_vector(scores + i) * step.scale, step.columns - i, -kInfinity<Real>);
    store_vector(scores + i, x);
    highest = x > highest ? x : highest;
  }
  const Real before = step.row_max[row];
  const Real row_highest = max_of_lanes<Real>(highest);
  const Real now = row_highest > before ? row_highest : before;
  Vector<Real> sum = {};
  for (std::int64_t i = 0; i < step.columns; i += kStep) {
    const Vector<Real> p = exp<Real>(load_vector(scores + i) - now);
    store_vector(scores + i, p);
    sum += p;
  }
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
    const Real lse = g.lse[row], delta = g.delta[row];
    const std::int64_t visible = g.visible[row];
    for (std::int64_t i = 0; i < visible; i += kStep) {
      const Vector<Real> p = first_lanes<Real>(exp<Real>(load_vector(s + i) * g.scale - lse), visible - i, 0);
      store_vector(s + i, p);
      if (!dp) continue;
      const Vector<Real> ds = p * (load_vector(dp + i) - delta) * g.scale;
      store_vector(dp + i, first_lanes<Real>(ds, visible - i, 0));
    }
    for (std::int64_t i = visible; i < g.columns; ++i) {
      s[i] = 0;
      if (dp) dp[i] = 0;
    }
  }
}

template <typename Real>
constexpr Kernels<Real> make_kernels(const char* instruction_set) {
  return {.instruction_set = instruction_set,
          .multiply = multiply<Real>,
          .softmax_step = softmax_step<Real>,
          .score_gradients = score_gradients<Real>,
          .load = load_elements,
          .store = store_elements};
}

constexpr KernelSet make_kernel_set(const char* instruction_set) {
  return {make_kernels<float>(instruction_set), make_kernels<double>(instruction_set)};
}

}  // namespace
}  // namespace nsa::cpu
