// Tile choices of dQ, the only place that makes them.
#pragma once

#include "common/range_args.h"
#include "device/tile.cuh"

namespace nsa::sm80::range_dq {

// Warps of 16 query rows, which also load. Keys of a stage are taken in steps of 32 (16), which keeps scores and dP
// small. Registers a thread, of 255: dQ Dk / 2 + scores and dP kStep + about 50, and where they fit, Q Dk / 4 and dO
// Dv / 4; else those lie in shared memory.
//   (64, 64) 32 + 32 + 50 + 32 = 146   (128, 128) 64 + 32 + 50 + 64 = 210
//   (192, 128) 96 + 32 + 50, (256, 256) 128 + 32 + 50: 4 warps, whose Q and dO take 40 (64) KB of 99
template <typename Element_, int kDk_, int kDv_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kWarps = cuda::range_tiles(Backend::kSm80, true, kDk).query_units;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr bool kRowsInRegisters = kDk <= 128;
  static constexpr int kKeys = kDk == 256 ? 16 : kDk == 192 ? 32 : 64;  // a stage
  static constexpr int kStep = kDk == 256 ? 16 : 32;
  static constexpr int kDoutBytes = 16 * 2 * kDk;  // where dO begins in a warp's rows
  static constexpr int kWarpBytes = kRowsInRegisters ? 0 : kDoutBytes + 16 * 2 * kDv;
  static constexpr int kKeyBytes = 2 * kKeys * kDk, kStageBytes = kKeyBytes + 2 * kKeys * kDv;
  static constexpr int kMaxStages = (99 * 1024 - kWarps * kWarpBytes) / kStageBytes;
  static constexpr int kStages = kMaxStages < 4 ? kMaxStages : 4;
  static constexpr int kRowsAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kRowsAt + kWarps * kWarpBytes;
  static_assert(kStages >= 2);
};

}  // namespace nsa::sm80::range_dq
