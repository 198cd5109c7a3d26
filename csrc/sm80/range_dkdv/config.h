// Tile choices of dK and dV, the only place that makes them.
#pragma once

#include "common/range_args.h"
#include "device/tile.cuh"

namespace nsa::sm80::range_dkdv {

// A CTA owns 64 keys and takes a chunk of the query rows that see them, kRows a stage, in slices of 32 (16). Its 8
// warps are laid out over (16 keys) x 2: slices in turn, whose sums are added up at the end; with head dim 256 the
// column halves of dK and dV.
//
// Registers a thread, of 255: dK and dV (Dk + Dv) / (2 kSplit) + S and dP kSlice + about 65.
//   (64, 64) 64 + 32 + 65 = 161   (128, 128) 128 + 32 + 65 = 225   (192, 128) 160 + 16 + 65 = 241
//   (256, 256) 256 in one piece: two warps share the columns and both compute S and dP, 1.5 times the products
//
// 99 KB of shared memory hold K, V and two stages.
template <typename Element_, int kDk_, int kDv_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16 * cuda::range_tiles(Backend::kSm80, true, kDk).key_units;
  static constexpr int kSlice = kDk == 192 || kDk == 256 ? 16 : 32;
  static constexpr int kRows = kDk == 256 ? 16 : kDk == 192 ? 32 : 64;  // query rows a stage
  static constexpr int kSplit = kDk == 256 ? 2 : 1;
  static constexpr int kSlices = 2 / kSplit;                                  // warps that take slices in turn
  static constexpr int kDkColumns = kDk / kSplit, kDvColumns = kDv / kSplit;  // of a warp

  static constexpr int kKeyBytes = kKeys * device::Tile<kDk>::kRowBytes;
  static constexpr int kBlockBytes = kKeyBytes + kKeys * device::Tile<kDv>::kRowBytes;
  // A stage: Q rows, dO rows, lse2 and delta of each row, an array each.
  static constexpr int kDout = kRows * device::Tile<kDk>::kRowBytes;
  static constexpr int kLse = kDout + kRows * device::Tile<kDv>::kRowBytes, kDelta = kLse + 4 * kRows;
  static constexpr int kStageBytes = kDelta + 4 * kRows;
  static constexpr int kMaxStages = (99 * 1024 - kBlockBytes) / kStageBytes;
  static constexpr int kStages = kMaxStages < 4 ? kMaxStages : 4;
  static constexpr int kSharedBytes = kBlockBytes + kStages * kStageBytes;

  // Half of the warps leave their sums in the block and the stages for the other half.
  static constexpr int kSumBytes = 16 * (kDkColumns + kDvColumns) * 4;
  static_assert(kStages >= 2 && kKeys == 64);
  static_assert(kSlices == 1 || kWarps / 2 * kSumBytes <= kSharedBytes);
  static_assert(kStageBytes % 128 == 0 && kDout % 128 == 0);
};

}  // namespace nsa::sm80::range_dkdv
