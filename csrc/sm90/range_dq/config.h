// Tile choices of the Hopper dQ, the only place that makes them.
#pragma once

#include "common/range_args.h"
#include "device/tile.cuh"

namespace nsa::sm90::range_dq {

// Consumer warpgroups of 64 query rows, and a producer of one thread. Q and dO lie in shared memory, so a thread holds
// dQ Dk / 2, scores and dP keys / 2 each, dS keys / 4 and about 30 more:
//   (64, 64) 32 + 32 + 32 + 16: three warpgroups of 160 registers
//   (128, 128) 64 + 48 + 48 + 24   (192, 128) 96 + 32 + 32 + 16   (256, 256) 128 + 16 + 16 + 8: two of 240
template <typename Element_, int kDk_, int kDv_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kKeys = kDk == 256 ? 32 : kDk == 128 ? 96 : 64;  // a stage
  static constexpr int kUnits = cuda::range_tiles(Backend::kSm90, true, kDk).query_units;
  static constexpr int kRows = 16 * kUnits;
  static constexpr int kConsumers = 32 * kUnits, kThreads = kConsumers + 128;
  static constexpr int kConsumerRegisters = kUnits == 12 ? 160 : 240, kProducerRegisters = kUnits == 12 ? 32 : 24;

  static constexpr int kQueryBytes = 64 * 2 * kDk;  // of a warpgroup
  static constexpr int kRowBytes = kQueryBytes + 64 * 2 * kDv;
  static constexpr int kRowUnroll = 1;  // the producer of Q and dO lacks registers to load two side by side
  static constexpr int kKeyBytes = 2 * kKeys * kDk, kStageBytes = kKeyBytes + 2 * kKeys * kDv;
  // Barriers; the places of two tiles; what every row sees; Q and dO; stages.
  static constexpr int kInfos = 128, kSeen = 256, kQueries = 2048;
  static constexpr int kStagesAt = kQueries + kRows / 64 * kRowBytes;
  static constexpr int kMaxStages = (227 * 1024 - kStagesAt) / kStageBytes;
  static constexpr int kStages = kMaxStages < 6 ? kMaxStages : 6;
  static constexpr int kSharedBytes = kStagesAt + kStages * kStageBytes;
  static_assert(kStages >= 2 && kSeen + 8 * kRows <= kQueries && 16 + 16 * kStages <= kInfos);
};

}  // namespace nsa::sm90::range_dq
