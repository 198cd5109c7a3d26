// Tile choices of dK and dV, the only place that makes them.
#pragma once

#include "device/tile.cuh"

namespace nsa::sm80::selected_dkdv {

// A CTA owns up to 64 keys of one block and takes the query rows that chose it, kRows a stage, in slices of 32 (16).
// Its 8 warps are laid out over (16 keys) x (column halves of dK, dV) x (slices); what is left over for slices is added
// up at the end.
//
// Registers a thread, of 255: dK and dV (Dk + Dv) / (2 kSplit) + S and dP kSlice + about 65.
//   (64, 64)     64 + 32 + 65 = 161
//   (128, 128)  128 + 32 + 65 = 225
//   (192, 128)  160 + 16 + 65 = 241
//   (256, 256)  256 in one piece: two warps share the columns and both compute S and dP, 1.5 times the products
template <typename Element_, int kDk_, int kDv_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 64;                    // of a CTA, at most
  static constexpr int kRows = kDk == 256 ? 32 : 64;  // query rows a stage
  static constexpr int kSlice = kDk == 192 ? 16 : 32;
  static constexpr int kSplit = kDk == 256 ? 2 : 1;
  static constexpr int kDkColumns = kDk / kSplit, kDvColumns = kDv / kSplit;  // of a warp

  static constexpr int kKeyBytes = kKeys * device::Tile<kDk>::kRowBytes;
  static constexpr int kBlockBytes = kKeyBytes + kKeys * device::Tile<kDv>::kRowBytes;
  // A stage: Q rows, dO rows; lse2, delta and the last visible key of each row, an array each.
  static constexpr int kDout = kRows * device::Tile<kDk>::kRowBytes;
  static constexpr int kLse = kDout + kRows * device::Tile<kDv>::kRowBytes;
  static constexpr int kDelta = kLse + 4 * kRows, kLastKeys = kDelta + 4 * kRows;
  static constexpr int kStageBytes = kLastKeys + 4 * kRows;

  static constexpr int kMaxStages = 8;
  static constexpr int kBlock = 16 * kMaxStages;  // two barriers a stage in front
  static constexpr int kStages = kBlock + kBlockBytes;
  static int num_stages(int shared_bytes) {
    const int stages = (shared_bytes - kStages) / kStageBytes;
    return stages < kMaxStages ? stages : kMaxStages;
  }
  static int shared_bytes(int stages) { return kStages + stages * kStageBytes; }

  // Half of the warps leave their sums in the block and the first stage for the other half.
  static constexpr int kSumBytes = 16 * (kDkColumns + kDvColumns) * 4;
  static_assert(kWarps / 2 * kSumBytes <= kBlockBytes + kStageBytes);
  static_assert(kBlock % 128 == 0 && kStageBytes % 128 == 0 && kDout % 128 == 0);
};

}  // namespace nsa::sm80::selected_dkdv
