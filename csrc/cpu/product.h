// The one matrix product behind Q K^T, P V, dO V^T, dS K, P^T dO and dS^T Q. As vector.h, for kernels_*.cpp alone.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace nsa::cpu {
namespace {

// The tile of c that lives in registers, rows x vectors: 16 accumulators of 32 registers (AVX-512), 12 of 16 (AVX2), 8
// of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 4, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// c [kRows, kVectors vectors] at (row, column).
template <typename Real, int kRows, int kVectors>
void multiply_tile(const Product<Real>& p, std::int64_t row, std::int64_t column) {
  constexpr int kStep = kLanes<Real>;
  Vector<Real> sum[kRows][kVectors] = {};
  Real* const c = p.c + row * p.c_row + column;
  const Real* a = p.a + row * p.a_row;
  const Real* b = p.b + column;
  const std::int64_t a_row = p.a_row, a_depth = p.a_depth, b_depth = p.b_depth;
  for (std::int64_t k = p.depth; k > 0; --k) {
    Vector<Real> line[kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) line[n] = load_vector(b + n * kStep);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) sum[m][n] += a[m * a_row] * line[n];
    }
    a += a_depth;
    b += b_depth;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) {
      // Sums of sums: thousands of terms added one by one to c would lose four times the digits in float.
      Real* const target = c + m * p.c_row + n * kStep;
      store_vector(target, p.accumulate ? load_vector(target) + sum[m][n] : sum[m][n]);
    }
  }
}

template <typename Real, int kVectors>
void multiply_columns(const Product<Real>& p, std::int64_t column) {
  std::int64_t row = 0;
  for (; row + kTileRows <= p.rows; row += kTileRows) multiply_tile<Real, kTileRows, kVectors>(p, row, column);
  static_assert(kTileRows <= 6);
  switch (p.rows - row) {
    case 5:
      return multiply_tile<Real, 5, kVectors>(p, row, column);
    case 4:
      return multiply_tile<Real, 4, kVectors>(p, row, column);
    case 3:
      return multiply_tile<Real, 3, kVectors>(p, row, column);
    case 2:
      return multiply_tile<Real, 2, kVectors>(p, row, column);
    case 1:
      return multiply_tile<Real, 1, kVectors>(p, row, column);
    default:
      return;
  }
}

// Columns outside, rows inside: the slice of b that a tile's columns need stays in the L1 cache for all rows.
template <typename Real>
void multiply(const Product<Real>& p) {
  constexpr int kStep = kLanes<Real>;
  std::int64_t column = 0;
  for (; column + (kTileVectors - 1) * kStep < p.columns; column += kTileVectors * kStep) {
    multiply_columns<Real, kTileVectors>(p, column);
  }
  if constexpr (kTileVectors > 2) {
    if (column + 2 * kStep < p.columns) return multiply_columns<Real, 3>(p, column);
    if (column + kStep < p.columns) return multiply_columns<Real, 2>(p, column);
  }
  if (column < p.columns) multiply_columns<Real, 1>(p, column);
}

}  // namespace
}  // namespace nsa::cpu
