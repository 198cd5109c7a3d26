// Tile choices of block selection, the only place that makes them.
#pragma once

#include "common/selection_args.h"
#include "device/block_pool.cuh"

namespace nsa::sm80::select_blocks {

// Groups of four warps, each with 64 q rows of whole tokens; Q lies in shared memory. A thread holds scores keys / 2,
// sums of blocks 16 and about 50 more. In the 99 KiB of consumer Ampere, with the table of 10 KiB and lists of 8 KiB a
// group:
//   Dk 64: 2 (8 + 18) + stages of 8    128: 2 (16 + 18) + 16 a stage    192: 24 + 18 + 12    256: 32 + 18 + 16
template <typename Element_, int kDk_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_;
  static constexpr int kGroups = cuda::selection_groups(Backend::kSm80, kDk);
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kCtas = kGroups == 1 ? 2 : 1;  // of an SM, where its shared memory holds them
  static constexpr int kKeys = kDk <= 128 ? 64 : 32;  // a stage
  static constexpr int kQueryBytes = 2 * cuda::kSelectionRows * kDk;
  static constexpr int kStageBytes = 2 * kKeys * kDk;
  static constexpr int kMaxStages = 4;

  // Shared memory: token states, lists, tables, Q, stages. Sizes of one group.
  static constexpr int kListsAt = kGroups * device::kStateBytes;
  static constexpr int tables_at(int list_bytes) { return (kListsAt + kGroups * list_bytes + 127) / 128 * 128; }
  static constexpr int queries_at(int list_bytes) { return tables_at(list_bytes) + kGroups * device::kPoolBytes; }
  static constexpr int stages_at(int list_bytes) { return queries_at(list_bytes) + kGroups * kQueryBytes; }
  static constexpr int num_stages(int shared_bytes, int list_bytes) {
    const int fit = (shared_bytes - stages_at(list_bytes)) / kStageBytes;
    return fit < kMaxStages ? fit : kMaxStages;
  }
  static_assert(kListsAt % 128 == 0 && device::kPoolBytes % 128 == 0 && kStageBytes % 128 == 0);
  static_assert(num_stages(99 * 1024, cuda::kSharedListBytes) >= 1);
};

}  // namespace nsa::sm80::select_blocks
