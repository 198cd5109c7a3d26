// Tile choices of the forward, the only place that makes them.
#pragma once

#include "common/range_args.h"
#include "device/tile.cuh"

namespace nsa::sm80::range_forward {

// Warps of 16 query rows, which also load: all of a CTA's rows see nearly the same keys. Registers a thread, of 255:
// Q Dk / 4 + O Dv / 2 + scores keys / 2 + about 65.
//   (64, 64) 16 + 32 + 32 + 65 = 145   (128, 128) 32 + 64 + 32 + 65 = 193   (192, 128) 48 + 64 + 32 + 65 = 209
//   (256, 256) 128 + 16 + 65 = 209: Q lies in shared memory
// Stages: as many as 99 KB of shared memory hold, which every GPU since Ampere has.
template <typename Element_, int kDk_, int kDv_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kWarps = cuda::range_tiles(Backend::kSm80, false, kDk).query_units;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = kDk == 256 ? 32 : 64;  // a stage
  static constexpr int kKeyBytes = 2 * kKeys * kDk, kStageBytes = kKeyBytes + 2 * kKeys * kDv;
  static constexpr bool kRowsInRegisters = kDk < 256;
  static constexpr int kWarpBytes = kRowsInRegisters ? 0 : 16 * 2 * kDk;
  static constexpr int kMaxStages = (99 * 1024 - kWarps * kWarpBytes) / kStageBytes;
  static constexpr int kStages = kMaxStages < 4 ? kMaxStages : 4;
  static constexpr int kRowsAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kRowsAt + kWarps * kWarpBytes;
  static_assert(kStages >= 2);
};

}  // namespace nsa::sm80::range_forward
