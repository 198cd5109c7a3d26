// dK and dV of a range item: where their sums go.
#pragma once

#include "device/key_item.cuh"
#include "device/range_tile.cuh"

namespace nsa::device {

// Writes a warp's 16 keys, from key `first` of the item on, and its columns: gradients, or a partial tile.
template <typename Config, typename Item>
__device__ __forceinline__ void store_range_sums(const cuda::RangeBackwardArgs& a, const Item& item, int first,
                                                 int half, int lane, const KeySums<Config>& sums) {
  using Element = typename Config::Element;
  const int dk_column = half * Config::kDkColumns, dv_column = half * Config::kDvColumns;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = first + lane / 4 + 8 * r;
    if (key >= item.keys) continue;
    if (item.partial >= 0) {
      float* row =
          a.partials + (static_cast<int64_t>(item.partial) * Config::kKeys + key) * (Config::kDk + Config::kDv);
      store_partial<Config::kDkColumns>(row + dk_column, sums.dk, r, lane);
      store_partial<Config::kDvColumns>(row + Config::kDk + dv_column, sums.dv, r, lane);
      continue;
    }
    const int k_row = item.first_key + key;
    if (a.dk.data)
      store_row<Element, Config::kDkColumns>(a.dk.at(k_row, item.head) + 2 * dk_column, sums.dk, r, a.scale, lane);
    if (a.dv.data)
      store_row<Element, Config::kDvColumns>(a.dv.at(k_row, item.head) + 2 * dv_column, sums.dv, r, 1.f, lane);
  }
}

}  // namespace nsa::device
