// Tile choices of the forward, the only place that makes them.
#pragma once

#include "device/key_ring.cuh"

namespace nsa::sm80::selected_forward {

// Registers a thread: Q Dk / 4 + O Dv / 2 + scores keys / 2 + about 45. They are counted per quarter of an SM, so warps
// come in fours: 16 warps have 128 each, 12 have 168, 8 have 255.
//   (64, 64)    16 + 32 + 32 + 45 = 125  -> 12 + 4 warps (with 14 + 2 the producers' longer masks spilled)
//   (128, 128)  32 + 64 + 32 + 45 = 173  -> 10 + 2 warps
//   (192, 128)  48 + 64 + 32 + 45 = 189  -> 6 + 2 warps
//   (256, 256)  64 + 128 + 16 + 45 = 253 -> 6 + 2 warps, 32 keys a stage
// More consumer warps share a loaded block among more tokens; two producers keep up with the L2.
template <typename Element_, int kDk, int kDv>
struct Config
    : device::KeyRingShape<device::QueryTileShape<kDk, kDv, kDk == 256 ? 32 : 64,
                                                  kDk == 64    ? 12
                                                  : kDk == 128 ? 10
                                                               : 6,
                                                  kDk == 64 ? 4 : 2, 0, device::Tile<kDk>, device::Tile<kDv>>> {
  using Element = Element_;
};

}  // namespace nsa::sm80::selected_forward
