// One query's choice of blocks: what is forced, and a running list of the best others.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/ranges.h"

namespace nsa::cpu {

// Which blocks of its sequence a query may and must take; ids are local to the sequence.
struct BlockCandidates {
  std::int64_t count = 0;                       // ids 0 .. count - 1 are candidates
  std::int64_t init_end = 0;                    // [0, init_end) is forced,
  std::int64_t local_begin = 0, local_end = 0;  // and so is this; init_end <= local_begin

  std::int64_t forced() const { return init_end + local_end - local_begin; }
  bool is_forced(std::int64_t id) const { return id < init_end || (id >= local_begin && id < local_end); }
};

inline BlockCandidates block_candidates(const BlockSelection& args, std::int64_t num_tokens, std::int64_t position) {
  const std::int64_t blocks = num_tokens == 0 ? 0 : (num_tokens - 1) / args.block_size + 1;
  const std::int64_t own = floor_divide(position, args.block_size);
  BlockCandidates c;
  c.count = args.problem.causal ? std::clamp<std::int64_t>(own + 1, 0, blocks) : blocks;
  c.init_end = std::min(args.init_blocks, c.count);
  c.local_begin = std::clamp(own - args.local_blocks + 1, c.init_end, c.count);
  c.local_end = std::clamp(own + 1, c.local_begin, c.count);
  return c;
}

// The best of the blocks offered, in descending order of their scores; blocks come with ascending ids, so that a tie
// goes to the one that is there.
template <typename Real>
struct BlockRanking {
  BlockCandidates candidates;
  std::int64_t budget = 0, kept = 0;  // beside the forced ones
  Real* scores = nullptr;             // [n]
  std::int32_t* ids = nullptr;        // [n]

  // Whether scores decide anything.
  bool is_open(std::int64_t topk) const { return candidates.count > topk; }

  void offer(std::int64_t id, Real score) {
    if (kept < budget) {
      ++kept;
    } else if (kept == 0 || !(score > scores[kept - 1])) {
      return;
    }
    std::int64_t at = kept - 1;
    for (; at > 0 && scores[at - 1] < score; --at) {
      scores[at] = scores[at - 1];
      ids[at] = ids[at - 1];
    }
    scores[at] = score;
    ids[at] = static_cast<std::int32_t>(id);
  }

  // Ascending ids, then -1: [topk]
  void write(std::int64_t topk, std::int32_t* block_indices) const {
    std::int32_t* next = block_indices;
    if (!is_open(topk)) {
      for (std::int64_t id = 0; id < candidates.count; ++id) *next++ = static_cast<std::int32_t>(id);
    } else {
      next = std::copy(ids, ids + kept, next);
      for (std::int64_t id = 0; id < candidates.init_end; ++id) *next++ = static_cast<std::int32_t>(id);
      for (std::int64_t id = candidates.local_begin; id < candidates.local_end; ++id) {
        *next++ = static_cast<std::int32_t>(id);
      }
      std::sort(block_indices, next);
    }
    std::fill(next, block_indices + topk, -1);
  }
};

}  // namespace nsa::cpu
