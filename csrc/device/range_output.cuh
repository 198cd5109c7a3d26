// o, lse and the gated sum of range attention.
#pragma once

#include "common/gates.cuh"
#include "device/range_tile.cuh"
#include "device/softmax.cuh"

namespace nsa::device {

// Of a row that sees nothing: 0, so that o is.
__device__ __forceinline__ float inverse_sum(float total) { return total == 0.f ? 0.f : 1.f / total; }

__device__ __forceinline__ void store_lse(const cuda::RangeForwardArgs& a, bool real, int token, int head, float lse,
                                          int lane) {
  if (real && a.lse.data && (lane & 3) == 0) *reinterpret_cast<float*>(a.lse.at(token, head)) = lse;
}

// Where the sum is wanted: calls for what store_sum() will read of a warp's 16 rows, `first_row` of the tile and on,
// while the tile is computed. Two lanes a row, one for each of the other branches.
template <int kDv, int kRows>
__device__ __forceinline__ void prefetch_branches(const cuda::RangeForwardArgs& a, const RangeQueries<kRows>& tile,
                                                  int first_row, int lane) {
  const cuda::BranchSum& b = a.branches;
  if (!b.sum.data) return;
  const auto row = tile.row(first_row + lane / 2, a.group);
  if (!row.real) return;
  const int c = lane & 1;
  const char* const other = c ? b.others[1].at(row.token, row.head) : b.others[0].at(row.token, row.head);
#pragma unroll
  for (int at = 0; at < 2 * kDv; at += 128) prefetch_line(other + at);
  prefetch_line(b.gates.at(row.token, row.head) + 2 * c * b.gate_bytes);
}

// Writes the sum of a lane's two rows, and o where it is wanted; rows: theirs. As much is read at once as registers
// hold beside O: two rows of 128 columns of two branches, 64.
template <typename Element, int kDv, typename Row>
__device__ __forceinline__ void store_sum(const cuda::RangeForwardArgs& a, const float (&o)[kDv / 8][4],
                                          const Row (&rows)[2], const float (&inverse)[2], int lane) {
  constexpr int kPieces = kDv < 128 ? kDv / 32 : 4;
  const cuda::BranchSum& b = a.branches;
  float gates[2][3] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!rows[r].real) continue;
#pragma unroll
    for (int c = 0; c < 3; ++c)
      gates[r][c] = cuda::load_gate(b.gate_dtype, b.gates.at(rows[r].token, rows[r].head) + c * b.gate_bytes);
  }
#pragma unroll
  for (int first = 0; first < kDv / 32; first += kPieces) {
    uint4 others[2][2][kPieces] = {};
    const int column_bytes = 64 * first + 16 * (lane & 3);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!rows[r].real) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const char* const from = b.others[c].at(rows[r].token, rows[r].head) + column_bytes;
#pragma unroll
        for (int n = 0; n < kPieces; ++n) others[r][c][n] = __ldcs(reinterpret_cast<const uint4*>(from) + 4 * n);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint4* const sum_to = reinterpret_cast<uint4*>(b.sum.at(rows[r].token, rows[r].head) + column_bytes);
      uint4* const o_to = reinterpret_cast<uint4*>(a.o.at(rows[r].token, rows[r].head) + column_bytes);
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        float own[8], sum[8] = {};
        gather8(own, o, first + n, r, inverse[r], lane);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float x[8];
          unpack8<Element>(others[r][c][n], x);
          cuda::add_gated(gates[r][c], x, sum);
        }
        cuda::add_gated(gates[r][2], own, sum);
        if (rows[r].real) sum_to[4 * n] = pack8<Element>(sum);
        if (rows[r].real && a.o.data) o_to[4 * n] = pack8<Element>(own);
      }
    }
  }
}

// Writes a lane's two rows, first_row and first_row + 8 of the tile. A dead row (nothing seen) gets o = 0, lse = -inf;
// a NaN shows.
template <typename Element, int kDv, int kRows>
__device__ __forceinline__ void store_outputs(const cuda::RangeForwardArgs& a, const OnlineSoftmax<kDv>& softmax,
                                              const RangeQueries<kRows>& tile, int first_row, int lane) {
  if (a.branches.sum.data) {
    const typename RangeQueries<kRows>::Row rows[2] = {tile.row(first_row, a.group), tile.row(first_row + 8, a.group)};
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = softmax.row_sum(r);
      inverse[r] = inverse_sum(total);
      store_lse(a, rows[r].real, rows[r].token, rows[r].head, softmax.lse(r, total), lane);
    }
    store_sum<Element, kDv>(a, softmax.o, rows, inverse, lane);
    return;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto row = tile.row(first_row + 8 * r, a.group);
    const float total = softmax.row_sum(r);
    char* to = row.real ? a.o.at(row.token, row.head) : nullptr;
    store_row_wide<Element, kDv>(to, row.real, softmax.o, r, inverse_sum(total), lane);
    store_lse(a, row.real, row.token, row.head, softmax.lse(r, total), lane);
  }
}

}  // namespace nsa::device
