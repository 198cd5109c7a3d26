// Tile choices of the Hopper dQ, the only place that makes them.
#pragma once

#include "device/query_tile.cuh"

namespace nsa::sm90::selected_dq {

// Two consumer warpgroups of 4 units (64 rows) and one producer warpgroup. Q and dO lie in shared memory, so a thread
// holds dQ Dk / 2, scores and dP keys / 2 each, dS keys / 4 and about 25 more, of 232 (producers 40): (192, 128) 96 +
// 80 + 25 = 201, (256, 256) 128 + 40 + 25 = 193; mma.sync's operands take the rest. A third consumer warpgroup would
// leave 152.
constexpr cuda::TileSize tile_size(int dk) { return {8, dk == 256 ? 32 : 64}; }

template <typename Element_, int kDk, int kDv>
struct Config
    : device::QueryTileShape<kDk, kDv, tile_size(kDk).keys, tile_size(kDk).warps, 4, 32 * (kDk + kDv),
                             device::BoxTile<kDk, tile_size(kDk).keys>, device::BoxTile<kDv, tile_size(kDk).keys>> {
  using Element = Element_;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;
};

}  // namespace nsa::sm90::selected_dq
