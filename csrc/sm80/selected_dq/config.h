// Tile choices of dQ, the only place that makes them.
#pragma once

#include "device/key_ring.cuh"

namespace nsa::sm80::selected_dq {

// Registers a thread: dQ Dk / 2 + scores 16 + dP 16 + about 50; Q and dO lie in shared memory, 32 (Dk + Dv) bytes a
// warp. A stage is taken in steps of 32 keys: that keeps the scores small, so that more warps (tokens) share a block.
//   (64, 64)     32 + 32 + 50 = 114  -> 14 + 2 warps (128)
//   (128, 128)   64 + 32 + 50 = 146  -> 10 + 2 warps (168)
//   (192, 128)   96 + 32 + 50 = 178  -> 6 + 2 warps (255)
//   (256, 256)  128 + 32 + 50 = 210  -> 6 + 2 warps (255)
template <typename Element_, int kDk, int kDv>
struct Config
    : device::KeyRingShape<device::QueryTileShape<kDk, kDv, kDk == 256 ? 32 : 64,
                                                  kDk == 64    ? 14
                                                  : kDk == 128 ? 10
                                                               : 6,
                                                  2, 32 * (kDk + kDv), device::Tile<kDk>, device::Tile<kDv>>> {
  using Element = Element_;
  static constexpr int kStep = 32;  // keys
};

}  // namespace nsa::sm80::selected_dq
