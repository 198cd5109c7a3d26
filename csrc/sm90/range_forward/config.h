// Tile choices of the Hopper forward, the only place that makes them.
#pragma once

#include "common/range_args.h"
#include "device/tile.cuh"

namespace nsa::sm90::range_forward {

// Two consumer warpgroups of 64 query rows, and a producer of one thread that needs 24 registers: with 384 threads that
// leaves the consumers 240. A thread holds O Dv / 2, scores keys / 2, P keys / 4 and about 40 more:
//   (64, 64) 32 + 64 + 32   (128, 128) 64 + 88 + 44   (192, 128) 64 + 64 + 32   (256, 256) 128 + 32 + 16
// 176 keys: three stages hold the 519 keys that a window of 512 has for 8 tokens; stages of 128 take five of them (2.18
// against 2.46 ms, 64K tokens, one H100).
template <typename Element_, int kDk_, int kDv_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kKeys = kDk == 256 ? 64 : kDk == 128 ? 176 : 128;  // a stage
  static constexpr int kUnits = cuda::range_tiles(Backend::kSm90, false, kDk).query_units;
  static constexpr int kRows = 16 * kUnits;
  static constexpr int kConsumers = 32 * kUnits, kThreads = kConsumers + 128;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

  static constexpr int kRowBytes = 64 * 2 * kDk;  // of a warpgroup
  static constexpr int kRowUnroll = kRows / 64;   // warpgroups whose rows the producer loads side by side
  static constexpr int kKeyBytes = 2 * kKeys * kDk, kValueBytes = 2 * kKeys * kDv;
  static constexpr int kStageBytes = kKeyBytes + kValueBytes;
  // Barriers and the places of two tiles; Q; stages.
  static constexpr int kInfos = 256, kQueries = 1024;
  static constexpr int kStagesAt = kQueries + kRows / 64 * kRowBytes;
  static constexpr int kMaxStages = (227 * 1024 - kStagesAt) / kStageBytes;
  static constexpr int kStages = kMaxStages < 4 ? kMaxStages : 4;
  static constexpr int kSharedBytes = kStagesAt + kStages * kStageBytes;
  static_assert(kStages >= 2 && kRows == 128);
};

}  // namespace nsa::sm90::range_forward
