// Tile choices of the Hopper dK and dV, the only place that makes them.
#pragma once

#include "common/range_args.h"
#include "device/tile.cuh"

namespace nsa::sm90::range_dkdv {

// A CTA owns 128 keys, 64 a consumer warpgroup, and a producer warp brings the query rows of an item, kRows a stage.
// With head dim 256 it owns 64 keys: the warpgroups own half of the columns of dK and dV each, and both compute S and
// dP.
//
// Registers a thread, of 240: dK and dV (Dk + Dv) / (2 kSplit), S and dP kRows, one of P^T and dS^T kRows / 4, and
// about 25 more.
//   (64, 64) 64 + 64 + 16   (128, 128) 128 + 64 + 16   (192, 128) 160 + 32 + 8   (256, 256) 128 + 32 + 8
template <typename Element_, int kDk_, int kDv_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kKeys = 16 * cuda::range_tiles(Backend::kSm90, true, kDk).key_units;
  static constexpr int kRows = kDk >= 192 ? 32 : 64;  // query rows a stage
  static constexpr int kSplit = kDk == 256 ? 2 : 1;
  static constexpr int kDkColumns = kDk / kSplit, kDvColumns = kDv / kSplit;  // of a warpgroup
  static constexpr int kConsumers = 256, kThreads = kConsumers + 128;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

  // K and V of 64 keys.
  static constexpr int kKeyBytes = 64 * 2 * kDk, kBlockBytes = kKeyBytes + 64 * 2 * kDv;
  using RowTileQ = device::BoxTile<kDk, kRows>;
  using RowTileDout = device::BoxTile<kDv, kRows>;
  // A stage: Q rows, dO rows, lse2 and delta of each row.
  static constexpr int kDout = 2 * kRows * kDk, kRowBytes = kDout + 2 * kRows * kDv;
  static constexpr int kLse = kRowBytes, kDelta = kLse + 4 * kRows;
  static constexpr int kStageBytes = (kDelta + 4 * kRows + 1023) / 1024 * 1024;
  // Barriers; the rows that see each key; K and V; stages.
  static constexpr int kSeen = 256, kBlocks = 2048;
  static constexpr int kStagesAt = kBlocks + kKeys / 64 * kBlockBytes;
  static constexpr int kMaxStages = (227 * 1024 - kStagesAt) / kStageBytes;
  static constexpr int kStages = kMaxStages < 6 ? kMaxStages : 6;
  static constexpr int kSharedBytes = kStagesAt + kStages * kStageBytes;
  static_assert(kStages >= 2 && kKeys * kSplit == 128);
};

}  // namespace nsa::sm90::range_dkdv
