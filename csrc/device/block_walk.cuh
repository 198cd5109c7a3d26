// Walks the union of the block lists of a tile's tokens, one block at a time in ascending order: a merge of sorted
// lists. Any number of blocks, any list width; nothing is stored. One warp walks; token i belongs to lane i % 32.
//
// A step costs about 30 instructions for up to 32 tokens and no shared memory. (All words always: 160 instructions, and
// with them the producers, not the L2, set the forward's pace.)
#pragma once

#include "common/plan.h"
#include "device/ptx.cuh"

namespace nsa::device {

template <int kWords>  // 32 tokens each
class BlockWalk {
 public:
  // lists: of the first token, [tokens, width]
  __device__ __forceinline__ void start(const int32_t* lists, int width, int num_tokens, int lane) {
    lists_ = lists + static_cast<int64_t>(lane) * width;
    width_ = width;
    words_ = (num_tokens + 31) / 32;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      position_[w] = 32 * w + lane < num_tokens ? 0 : width;
      current_[w] = read(w);
      ahead_[w] = read(w);
    }
    find_upcoming();
  }

  // The block that next() will return; kNoBlock at the end.
  __device__ __forceinline__ int upcoming() const { return upcoming_; }
  // 32-token words of members.
  __device__ __forceinline__ int words() const { return words_; }

  // Which tokens chose upcoming(), as bits: lane w gets those of word w, lanes past words() zero. Then steps on.
  __device__ __forceinline__ unsigned next(int lane) {
    const int block = upcoming_;
    unsigned members = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (w > 0 && w >= words_) break;
      const bool member = block != cuda::kNoBlock && current_[w] == block;
      const unsigned word = __ballot_sync(kFullWarp, member);
      if (lane == w) members = word;
      if (member) {
        current_[w] = ahead_[w];
        ahead_[w] = read(w);
      }
    }
    find_upcoming();
    return members;
  }

 private:
  __device__ __forceinline__ int read(int w) {
    if (position_[w] >= width_) return cuda::kNoBlock;
    return __ldg(lists_ + static_cast<int64_t>(32 * w) * width_ + position_[w]++);
  }

  __device__ __forceinline__ void find_upcoming() {
    int smallest = current_[0];
#pragma unroll
    for (int w = 1; w < kWords; ++w) {
      if (w < words_) smallest = min(smallest, current_[w]);
    }
    upcoming_ = __reduce_min_sync(kFullWarp, smallest);
  }

  const int32_t* lists_;                 // of token `lane`
  int position_[kWords];                 // of the next read
  int current_[kWords], ahead_[kWords];  // ahead hides the latency of the next read
  int width_, words_, upcoming_;
};

}  // namespace nsa::device
