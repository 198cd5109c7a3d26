// Tile choices of the Hopper dQ, the only place that makes them.
#pragma once

#include "device/query_tile.cuh"

namespace nsa::sm90::selected_dq {

// Two consumer warpgroups of 4 units (64 rows) and one producer warpgroup. Q and dO lie in shared memory, so a thread
// holds dQ Dk / 2, scores and dP keys / 2 each and about 35 more, of 216: (192, 128) 96 + 64 + 35 = 195, (256, 256) 128
// + 32 + 35 = 195. A third consumer warpgroup would leave 152.
template <typename Element_, int kDk, int kDv, int kKeys = kDk == 256 ? 32 : 64>
struct Config : device::QueryTileShape<kDk, kDv, kKeys, 8, 4, 32 * (kDk + kDv), device::BoxTile<kDk, kKeys>,
                                       device::BoxTile<kDv, kKeys>> {
  using Element = Element_;
  static constexpr int kConsumerRegisters = 216;
  static constexpr int kProducerRegisters = 72;
};

}  // namespace nsa::sm90::selected_dq
