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

  // Scores -> P = exp2(scores * scale_log2 - max2), following the maximum; O is rescaled where it moved.
  // Where sees says so, a score counts as -inf.
  template <typename Sees, int kColumns>
  __device__ __forceinline__ void update(float (&s)[kColumns][4], const Sees& sees, float scale_log2, int lane) {
    if (!(scale_log2 > 0.f)) {  // the maximum of the scaled scores isn't the scaled maximum: scale first
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
    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) highest[i / 2] = fmaxf(highest[i / 2], s[n][i]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(kFullWarp, highest[r], 1));
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(kFullWarp, highest[r], 2)) * scale_log2;
    }
    if (__any_sync(kFullWarp, highest[0] > max2[0] + kRescaleThreshold || highest[1] > max2[1] + kRescaleThreshold)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float moved = fmaxf(max2[r], highest[r]);
        const float factor = moved == -INFINITY ? 1.f : exp2_approx(max2[r] - moved);
        max2[r] = moved;
        sum[r] *= factor;
#pragma unroll
        for (int n = 0; n < kDv / 8; ++n) {
          o[n][2 * r] *= factor;
          o[n][2 * r + 1] *= factor;
        }
      }
    }
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

  // Writes the warp's rows. A dead row (nothing seen) gets o = 0, lse = -inf; a NaN shows.
  template <typename Element>
  __device__ __forceinline__ void store(const cuda::ForwardArgs& a, const QueryTile& tile, int warp, int lane) const {
    const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
      store_one<Element>(a, r, row.real, row.token, row.head, lane);
    }
  }

  // Writes one of a lane's two rows.
  template <typename Element, typename Args>
  __device__ __forceinline__ void store_one(const Args& a, int r, bool real, int token, int head, int lane) const {
    float total = sum[r];
    total += __shfl_xor_sync(kFullWarp, total, 1);
    total += __shfl_xor_sync(kFullWarp, total, 2);
    if (!real) return;
    store_row<Element, kDv>(a.o.at(token, head), o, r, total == 0.f ? 0.f : 1.f / total, lane);
    if (a.lse.data && (lane & 3) == 0) {
      *reinterpret_cast<float*>(a.lse.at(token, head)) = total == 0.f ? -INFINITY : max2[r] * kLn2 + logf(total);
    }
  }
};

}  // namespace nsa::device
