// Who of a query tile has anything to do with a block: flags for every unit of 16 rows.
#pragma once

#include "device/query_tile.cuh"

namespace nsa::device {

// The flags of a stage: one bit a unit. Without them each consumer warp spent 85 of 425 instructions a stage on finding
// out whether the stage concerned it.
struct StageFlags {
  static constexpr int kMaxUnits = 12;
  static constexpr unsigned kAny = (1u << kMaxUnits) - 1, kAll = kAny << kMaxUnits;
  static constexpr unsigned kLast = 0x80000000u;  // the tile's last stage
  // In no warpgroup did more than two units choose a block of the stage: half of wgmma's 64 rows, or more, would be
  // waste.
  static constexpr unsigned kAlone = 0x40000000u;
  // any_bits: of one block. Three or more of four bits: both of a pair and one of the other.
  static __device__ __forceinline__ unsigned alone(unsigned any_bits) {
    const unsigned both = any_bits & any_bits >> 1, either = any_bits | any_bits >> 1;
    return ((both & either >> 2) | (both >> 2 & either)) & 0x111 ? 0 : kAlone;
  }
  // Some token of the unit chose a block of the stage.
  static __device__ __forceinline__ unsigned any(int unit) { return 1u << unit; }
  // Every token of the unit chose every block of the stage and sees all of it: nothing is to be masked.
  static __device__ __forceinline__ unsigned all(int unit) { return 1u << (kMaxUnits + unit); }
};

// What lane u knows of unit u: its tokens as places in the tile, and the last key that all of them see. By whole warps.
struct UnitTokens {
  int first, count;
  int last_key;
  int2 of_tile;  // {first, number} as QueryTile::tokens() tells, but without a search of its own

  __device__ __forceinline__ UnitTokens(const cuda::Plan& plan, const QueryTile& tile, int warps,
                                        const cuda::Divisor& group, int lane) {
    first = count = 0;
    last_key = INT_MAX;
    const Unit unit(plan.units, tile.first_unit + min(lane, warps - 1), group);
    const int end = unit.real ? unit.last_token(group) + 1 : 0;
    of_tile.x = __shfl_sync(kFullWarp, unit.first_token, 0);
    of_tile.y = max(__reduce_max_sync(kFullWarp, end) - of_tile.x, 0);
    // or the unit only fills up its run's last 64 rows
    if (lane >= warps || !unit.real || unit.first_token >= unit.end_token) return;
    first = unit.first_token - of_tile.x;
    count = end - unit.first_token;
    for (int i = 0; i < count; ++i) last_key = min(last_key, __ldg(plan.last_key + unit.first_token + i));
  }
  __device__ __forceinline__ unsigned everybody() const { return (1u << count) - 1; }
  // Those of the tile's members (BlockWalk) that are the unit's; a unit has at most 16 tokens.
  __device__ __forceinline__ unsigned of(unsigned members) const {
    const unsigned low = __shfl_sync(kFullWarp, members, first / 32);
    const unsigned high = __shfl_sync(kFullWarp, members, first / 32 + 1);
    return __funnelshift_r(low, high, first & 31) & everybody();
  }
};

}  // namespace nsa::device
