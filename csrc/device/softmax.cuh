// The online softmax of a warp's 16 rows, and o with lse at its end.
#pragma once

#include "device/query_tile.cuh"

namespace nsa::device {

inline constexpr float kLn2 = 0.6931471805599453f;
// A row's maximum is only followed when it grows by more than this (log2): P stays below 2^8, exact enough in 16 bits,
// and most blocks don't touch O.
inline constexpr float kRescaleThreshold = 8.f;

template <int kDv>
struct OnlineSoftmax {
  float o[kDv / 8][4];
  float max2[2];  // of the scores * log2(e), as used
  float sum[2];   // this lane's share

  __device__ __forceinline__ void reset() {
    clear(o);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max2[r] = -INFINITY;
      sum[r] = 0.f;
    }
  }

  // Before exponentiate(): follows the rows' maximum. Where sees says so, a score becomes -inf. Scores are scaled here
  // where scale_log2, which becomes 1, isn't positive: their maximum isn't the scaled maximum.
  // True: the maximum moved, and O must be multiplied by factor[row] before the new P is added.
  template <typename Sees, int kColumns>
  __device__ __forceinline__ bool follow_maximum(float (&s)[kColumns][4], float (&factor)[2], const Sees& sees,
                                                 float& scale_log2, int lane) {
    if (!(scale_log2 > 0.f)) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= scale_log2;
      }
      scale_log2 = 1.f;
    }
    if (!sees.everything()) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!sees.sees(i / 2, n, i % 2, lane)) s[n][i] = -INFINITY;
        }
      }
    }
    float chain[4] = {s[0][0], s[0][1], s[0][2], s[0][3]};  // four, so that each step's latency hides
#pragma unroll
    for (int n = 1; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) chain[i] = fmaxf(chain[i], s[n][i]);
    }
    // Of this lane's columns. The other lanes' are asked for where some row's maximum moves: in most blocks none does,
    // and four shuffles in every block were 2 % of the forward.
    float highest[2] = {fmaxf(chain[0], chain[1]) * scale_log2, fmaxf(chain[2], chain[3]) * scale_log2};
    const bool moves =
        __any_sync(kFullWarp, highest[0] > max2[0] + kRescaleThreshold || highest[1] > max2[1] + kRescaleThreshold);
    if (moves) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(kFullWarp, highest[r], 1));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(kFullWarp, highest[r], 2));
        const float moved = fmaxf(max2[r], highest[r]);
        factor[r] = moved == -INFINITY ? 1.f : exp2_approx(max2[r] - moved);
        max2[r] = moved;
        sum[r] *= factor[r];
      }
    }
    return moves;
  }

  // Scores -> P = exp2(scores * scale_log2 - max2).
  template <int kColumns>
  __device__ __forceinline__ void exponentiate(float (&s)[kColumns][4], float scale_log2) {
    const float base[2] = {max2[0] == -INFINITY ? 0.f : max2[0], max2[1] == -INFINITY ? 0.f : max2[1]};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(s[n][i] * scale_log2 - base[i / 2]);
        sum[i / 2] += s[n][i];
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] *= factor[i / 2];
    }
  }

  // Writes the warp's rows. A dead row (nothing seen) gets o = 0, lse = -inf; a NaN shows.
  template <typename Element>
  __device__ __forceinline__ void store(const cuda::ForwardArgs& a, const QueryTile& tile, int warp, int lane) const {
    const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
      const float total = row_sum(r);
      char* to = row.real ? a.o.at(row.token, row.head) : nullptr;
      store_row_wide<Element, kDv>(to, row.real, o, r, total == 0.f ? 0.f : 1.f / total, lane);
      if (row.real && a.lse.data && (lane & 3) == 0) {
        *reinterpret_cast<float*>(a.lse.at(row.token, row.head)) = lse(r, total);
      }
    }
  }

  // Of row r, from all four of its lanes.
  __device__ __forceinline__ float row_sum(int r) const {
    float total = sum[r];
    total += __shfl_xor_sync(kFullWarp, total, 1);
    total += __shfl_xor_sync(kFullWarp, total, 2);
    return total;
  }
  __device__ __forceinline__ float lse(int r, float total) const {
    return total == 0.f ? -INFINITY : (max2[r] + __log2f(total)) * kLn2;
  }
};

}  // namespace nsa::device
