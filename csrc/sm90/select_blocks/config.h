// Tile choices of block selection on Hopper, the only place that makes them.
#pragma once

#include "common/selection_args.h"
#include "device/block_pool.cuh"

namespace nsa::sm90::select_blocks {

// Warpgroups of 64 q rows (whole tokens) and a producer of one thread. The tensor cores need as long for 64 x 128
// scores as the units of exp2 (512 clocks of an SM), so a warpgroup's products must run under the others'
// exponentials and lists: four warpgroups where shared memory holds their Q, each with one stage's scores. Three that
// multiplied one half of a stage under the other's exponentials took 5 % longer (64K tokens), 10 % at 8K.
// Registers: scores 64, sums of blocks 16, about 25 more; 104 are left of four warpgroups' 96 when the producer gives
// up 40.
template <typename Element_, int kDk_>
struct Config {
  using Element = Element_;
  static constexpr int kDk = kDk_;
  static constexpr int kGroups = cuda::selection_groups(Backend::kSm90, kDk);
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kConsumerRegisters = kGroups == 4 ? 104 : kGroups == 3 ? 152 : 224;
  static constexpr int kProducerRegisters = 56;  // a division of 64 bits takes 40
  static constexpr int kKeys = 128;              // a stage: 32 blocks, in order of the keys' class (block_pool.cuh)
  static constexpr int kQueryBytes = 2 * cuda::kSelectionRows * kDk;  // of a group
  static constexpr int kStageBytes = 2 * kKeys * kDk;
  static constexpr int kMaxStages = 4;

  // Shared memory: barriers, token states, lists, tables, one or two Q, stages.
  static constexpr int kStatesAt = 128;
  static constexpr int kListsAt = kStatesAt + kGroups * device::kStateBytes;
  static_assert(16 * (2 + kMaxStages) <= kStatesAt);
};

// How a launch divides shared memory.
struct Layout {
  int list_bytes;  // of a group; 0: lists lie in the workspace
  int tables;      // offset; no more than the whole warps' sums of G = 16 needs none
  int queries, query_buffers;
  int stages_at, stages;
  int bytes;
};

template <typename Config>
Layout make_layout(const cuda::SelectionArgs& a, int shared_bytes) {
  Layout l = {};
  l.list_bytes = a.lists ? 0 : a.tokens_per_group * a.token_bytes;
  l.tables = (Config::kListsAt + Config::kGroups * l.list_bytes + 127) / 128 * 128;
  const int table_bytes = a.group == 16 ? 0 : device::kPoolBytes;
  l.queries = (l.tables + Config::kGroups * table_bytes + 1023) / 1024 * 1024;
  const int query_bytes = Config::kGroups * Config::kQueryBytes;
  // A second Q hides the latency of a tile's beginning; two stages of keys matter more.
  for (l.query_buffers = 2; l.query_buffers >= 1; --l.query_buffers) {
    l.stages_at = l.queries + l.query_buffers * query_bytes;
    l.stages = (shared_bytes - l.stages_at) / Config::kStageBytes;
    if (l.stages >= 2 || (l.query_buffers == 1 && l.stages >= 1)) break;
  }
  if (l.stages > Config::kMaxStages) l.stages = Config::kMaxStages;
  l.bytes = l.stages_at + l.stages * Config::kStageBytes;
  return l;
}

}  // namespace nsa::sm90::select_blocks
