// Tile choices of the Hopper forward, the only place that makes them.
#pragma once

#include "device/block_ring.cuh"

namespace nsa::sm90::selected_forward {

// Consumer warpgroups of 4 units (64 rows) and one producer warpgroup. Q lies in shared memory, so a thread holds
// Dv / 2 of O, 32 scores, 16 of P and about 25 more; setmaxnreg moves the producers' registers to the consumers.
//   Dv <= 128: 3 consumer warpgroups (512 threads), 64 + 48 + 30 = 142 of 152, producers 56
//   Dv = 256:  2 consumer warpgroups (384 threads), 128 + 48 + 25 = 201 of 224, producers 56
constexpr cuda::TileSize tile_size(int dv) { return {dv == 256 ? 8 : 12, 64}; }

template <typename Element_, int kDk, int kDv>
struct Config : device::BlockRingShape<device::QueryTileShape<kDk, kDv, tile_size(kDv).keys, tile_size(kDv).warps, 4,
                                                              32 * kDk, device::BoxTile<kDk, tile_size(kDv).keys>,
                                                              device::BoxTile<kDv, tile_size(kDv).keys>>> {
  using Element = Element_;
  static constexpr int kConsumerRegisters = kDv == 256 ? 224 : 152;
  static constexpr int kProducerRegisters = 56;
};

}  // namespace nsa::sm90::selected_forward
