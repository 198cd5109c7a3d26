// Tile choices of the Hopper dK and dV, the only place that makes them.
#pragma once

#include "device/tile.cuh"

namespace nsa::sm90::selected_dkdv {

// A CTA owns 64 keys of one block; a producer warpgroup gathers the query rows that chose it, kRows a stage.
//
// Rows by TMA (kByThreads false): one CTA an SM, two consumer warpgroups take stages in turn and their sums are added
// at the end. With head dim 256 the two share every stage and own half of the columns of dK and dV each; both compute S
// and dP.
//
// Rows that threads copy one by one (kByThreads), where G is too small for boxes: the copying is what takes the time,
// so two CTAs an SM, of one consumer warpgroup each. dK/dV at 32K tokens, ms: G = 4 2.8 for 3.5, G = 1 1.6 for 2.25.
// With boxes 2 % slower.
//
// Registers a thread, of 232 or 216: dK and dV (Dk + Dv) / (2 kSplit) + S and dP, or S and the last stage's operands,
// kRows + about 30.
//   (64, 64) 64 + 64 + 30   (128, 128) 128 + 64 + 30 = 222, by threads 128 + 48 + 30 = 206   (192, 128) 160 + 32 + 30
//   = 222   (256, 256) 128 + 32 + 30 = 190
template <typename Element_, int kDk_, int kDv_, bool kByThreads_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr bool kByThreads = kByThreads_;
  static constexpr int kCtas = kByThreads && kDk <= 128 ? 2 : 1;        // of an SM
  static constexpr int kKeys = 64;                                      // of a CTA
  static constexpr int kRows = kDk >= 192 ? 32 : kCtas == 2 ? 48 : 64;  // query rows a stage
  static constexpr int kWarpgroups = 2 / kCtas;                         // consumers
  static constexpr int kSplit = kDk == 256 ? 2 : 1;
  static constexpr int kReaders = kSplit;                                     // warpgroups that read a stage
  static constexpr int kDkColumns = kDk / kSplit, kDvColumns = kDv / kSplit;  // of a warpgroup
  static constexpr int kConsumers = 128 * kWarpgroups, kProducers = 128, kThreads = kConsumers + kProducers;
  // Rows come by TMA where a box holds at least this many heads of a token (1 KB), by the 16 rows of a warp; smaller
  // boxes would be 64 and more a stage.
  static constexpr int kMinBoxHeads = 8, kBoxWarps = kRows / 16;
  static constexpr int kConsumerRegisters = kCtas == 2 ? 216 : 232, kProducerRegisters = 40;

  using KeyTileK = device::BoxTile<kDk, kKeys>;
  using KeyTileV = device::BoxTile<kDv, kKeys>;
  using RowTileQ = device::BoxTile<kDk, kRows>;
  using RowTileDout = device::BoxTile<kDv, kRows>;

  // A stage: Q rows, dO rows; lse2, delta and the last visible key of each row, an array each.
  static constexpr int kDout = 2 * kRows * kDk;
  static constexpr int kLse = kDout + 2 * kRows * kDv;
  static constexpr int kDelta = kLse + 4 * kRows, kLastKeys = kDelta + 4 * kRows;
  static constexpr int kStageBytes = (kLastKeys + 4 * kRows + 1023) / 1024 * 1024;

  static constexpr int kMaxStages = 8;
  static constexpr int kItem = 16 * kMaxStages;  // behind two barriers a stage
  static constexpr int kBlock = 1024;
  static constexpr int kValues = 2 * kKeys * kDk;
  static constexpr int kStages = kBlock + kValues + 2 * kKeys * kDv;
  static constexpr int stages_of(int shared_bytes) {  // an SM has 1 KB more, and every CTA takes one
    return ((shared_bytes + 1024) / kCtas - 1024 - kStages) / kStageBytes;
  }
  // A warpgroup gives a stage back when its next one is there, so each has two.
  static_assert(stages_of(227 * 1024) >= 2 * kWarpgroups / kReaders);
  static int num_stages(int shared_bytes) {
    const int stages = stages_of(shared_bytes);
    return stages < kMaxStages ? stages : kMaxStages;
  }
  static int shared_bytes(int stages) { return kStages + stages * kStageBytes; }

  // One warpgroup leaves its sums in the stages for the other, 16 keys a warp.
  static constexpr int kSumBytes = 16 * (kDkColumns + kDvColumns) * 4;
};

}  // namespace nsa::sm90::selected_dkdv
