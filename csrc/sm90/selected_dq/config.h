// Tile choices of the Hopper dQ, the only place that makes them.
#pragma once

#include "device/block_ring.cuh"

namespace nsa::sm90::selected_dq {

// Each consumer warp multiplies its own unit of 16 rows by mma.sync; producer warps load K, a stage each in turn: one
// alone took 800 cycles a stage, and 16 KB are 480 cycles at the L2's rate. A thread holds dQ, Dk / 2 registers, dS 16,
// and about 50 more:
//   Dk <= 128: 12 consumers and 4 producers, 64 + 16 + 50 of 152, which setmaxnreg gives
//   Dk >= 192: 7 and 1, 128 + 16 + 50 of 255; a stage is 1.5 or 2 times as long
constexpr cuda::TileSize tile_size(int dk) { return {dk <= 128 ? 12 : 7, 64}; }

// dS of a unit's rows and one block, and how many of them a warp has on their way or at work.
inline constexpr int kDepth = 3, kSliceBytes = 2048;

// kWholeTokens: 16 divides G, so that a unit's rows are one token's.
template <typename Element_, int kDk, int kDv, bool kWholeTokens_>
struct Config : device::BlockRingShape<device::QueryTileShape<
                    kDk, 0, tile_size(kDk).keys, tile_size(kDk).warps, kDk <= 128 ? 4 : 1, kDepth * kSliceBytes,
                    device::BoxTile<kDk, tile_size(kDk).keys>, device::BoxTile<0, 64>>> {
  using Element = Element_;
  static constexpr bool kWholeTokens = kWholeTokens_;
  static constexpr int kConsumerRegisters = 152, kProducerRegisters = 56;
  static constexpr int kDepth = selected_dq::kDepth, kSliceBytes = selected_dq::kSliceBytes;
};

}  // namespace nsa::sm90::selected_dq
