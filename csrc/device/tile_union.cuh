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
  // any_bits: of one block
  static __device__ __forceinline__ unsigned alone(unsigned any_bits) {
    unsigned shared = 0;
#pragma unroll
    for (int unit = 0; unit < kMaxUnits; unit += 4) {
      unsigned more = any_bits >> unit & 0xf;
      more &= more - 1;
      shared |= more & (more - 1);
    }
    return shared ? 0 : kAlone;
  }
  // Some token of the unit chose a block of the stage.
  static __device__ __forceinline__ unsigned any(int unit) { return 1u << unit; }
  // Every token of the unit chose every block of the stage and sees all of it: nothing is to be masked.
  static __device__ __forceinline__ unsigned all(int unit) { return 1u << (kMaxUnits + unit); }
};

// What lane u knows of unit u: its tokens as places in the tile, and the last key that all of them see.
struct UnitTokens {
  int first, count;
  int last_key;

  __device__ __forceinline__ UnitTokens(const cuda::Plan& plan, const QueryTile& tile, int tile_token, int warps,
                                        int group, int lane) {
    first = count = 0;
    last_key = INT_MAX;
    if (lane >= warps) return;
    const Unit unit(plan.units, tile.first_unit + lane, group);
    if (!unit.real || unit.first_token >= unit.end_token) return;  // or the unit only fills up its run's last 64 rows
    first = unit.first_token - tile_token;
    count = unit.last_token(group) - unit.first_token + 1;
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
