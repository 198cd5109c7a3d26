// The union of the block lists of a tile's tokens, all of it at once, in shared memory: a warp marks the listed blocks
// as bits of a window of 1024, and an entry's place is the number of marks before its block. A lane then describes a
// block by itself. By the machine code 1500 instructions for 12 tokens of 16 entries with a union of 129, and 870 with
// one of 30; a walk (BlockWalk) takes 16600 and 4300, and instructions, not latency, are what it waits for.
#pragma once

#include "device/tile_union.cuh"
#include "device/warp_scan.cuh"

namespace nsa::device {

struct BlockUnion {
  static constexpr int kWindow = 32 * 32;  // blocks: a word a lane

  // One unit's tokens as bits of two of the tile's words, and the last key that all of them see.
  struct alignas(16) UnitBits {
    unsigned low;
    int last_key;
    unsigned high;
    int word;  // that `low` belongs to
  };

  UnitBits* units;      // [kMaxUnits]
  uint2* window;        // [32] {which of 32 blocks are marked, the union's blocks before them}
  int* blocks;          // [capacity] the union, ascending
  unsigned* members;    // [words, capacity] which tokens chose a block, as bits
  int capacity, words;  // blocks, 32-bit words of tokens
  int token_step;       // 32 / list width

  // Bytes of shared memory that a warp needs, a multiple of 16.
  static __host__ __device__ __forceinline__ int64_t shared_bytes(int capacity, int words) {
    const int64_t fixed = StageFlags::kMaxUnits * sizeof(UnitBits) + 32 * sizeof(uint2);
    return fixed + (static_cast<int64_t>(capacity) * (1 + words) + 3) / 4 * 16;
  }

  __device__ __forceinline__ BlockUnion(char* shared, int capacity_, int words_, int token_step_)
      : capacity(capacity_), words(words_), token_step(token_step_) {
    units = reinterpret_cast<UnitBits*>(shared);
    window = reinterpret_cast<uint2*>(units + StageFlags::kMaxUnits);
    blocks = reinterpret_cast<int*>(window + 32);
    members = reinterpret_cast<unsigned*>(blocks + capacity);
  }

  // By lane u, of unit u.
  __device__ __forceinline__ void set_unit(int u, const UnitTokens& unit) const {
    const unsigned long long bits = static_cast<unsigned long long>(unit.everybody()) << (unit.first % 32);
    units[u] = {static_cast<unsigned>(bits), unit.last_key, static_cast<unsigned>(bits >> 32), unit.first / 32};
  }

  // lists: of the first token, [tokens, width]. Fills blocks and members and returns the number of blocks. A window
  // begins at the smallest block that is left, so sequences far apart cost no empty ones.
  __device__ __forceinline__ int collect(const int32_t* lists, int width, int num_tokens, int lane) const {
    int4* clear = reinterpret_cast<int4*>(blocks);
#pragma unroll 1
    for (int i = lane; i < (capacity * (1 + words) + 3) / 4; i += 32) clear[i] = {0, 0, 0, 0};
    int smallest = cuda::kNoBlock, count = 0;
#pragma unroll 1
    for (int t = lane; t < num_tokens; t += 32) smallest = min(smallest, __ldg(lists + t * width));
    int base = __reduce_min_sync(kFullWarp, smallest);
    while (base != cuda::kNoBlock) {
      window[lane].x = 0;
      __syncwarp();
      const int next = mark(lists, num_tokens * width, base, lane);
      __syncwarp();
      const int marked = __popc(window[lane].x), up_to = sum_up_to_lane(marked, lane);
      window[lane].y = count + up_to - marked;
      __syncwarp();
      place(lists, width, num_tokens * width, base, lane);
      count += __shfl_sync(kFullWarp, up_to, 31);
      base = __reduce_min_sync(kFullWarp, next);
      __syncwarp();
    }
    return count;
  }

  // The flags (any and all) of `part` keys of block i, `last` the k row of the last of them. kOneWord: words == 1.
  template <bool kOneWord>
  __device__ __forceinline__ unsigned flags(int i, int last) const {
    unsigned flags = 0;
    const unsigned only = members[i];
#pragma unroll
    for (int u = 0; u < StageFlags::kMaxUnits; ++u) {
      const UnitBits unit = units[u];
      unsigned mine, missing;
      if constexpr (kOneWord) {
        mine = only & unit.low;
        missing = ~only & unit.low;
      } else {
        const unsigned low = members[unit.word * capacity + i];
        const unsigned high = members[min(unit.word + 1, words - 1) * capacity + i];
        mine = (low & unit.low) | (high & unit.high);
        missing = (~low & unit.low) | (~high & unit.high);
      }
      if (mine) flags |= StageFlags::any(u);
      if (!missing && last <= unit.last_key) flags |= StageFlags::all(u);
    }
    return flags;
  }

 private:
  static constexpr int kAhead = 2;  // entries a lane whose reads are under way: 12 tokens of 16 give a lane 6, 8 give 4

  template <typename Function>
  static __device__ __forceinline__ void for_entries(const int32_t* lists, int entries, int lane, Function function) {
#pragma unroll 1
    for (int first = 0; first < entries; first += 32 * kAhead) {
      int block[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int i = first + 32 * a + lane;
        block[a] = i < entries ? __ldg(lists + i) : cuda::kNoBlock;
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) function(block[a]);
    }
  }

  // Marks the entries of the window from `base` on; returns the smallest that this lane saw behind it.
  __device__ __forceinline__ int mark(const int32_t* lists, int entries, int base, int lane) const {
    int next = cuda::kNoBlock;
    for_entries(lists, entries, lane, [&](int block) {
      const unsigned offset = block - base;  // huge for those of an earlier window
      if (block >= base + kWindow) next = min(next, block);
      if (offset < kWindow) atomicOr(&window[offset / 32].x, 1u << (offset % 32));
    });
    return next;
  }

  // Puts the entries of the window, with their tokens, where the marks before them say.
  __device__ __forceinline__ void place(const int32_t* lists, int width, int entries, int base, int lane) const {
    unsigned token = static_cast<unsigned>(lane) / width, column = lane - token * width;
    for_entries(lists, entries, lane, [&](int block) {
      const unsigned offset = block - base;
      if (offset < kWindow) {
        const uint2 word = window[offset / 32];
        const int rank = word.y + __popc(word.x & ((1u << (offset % 32)) - 1));
        atomicOr(blocks + rank, block);  // by several tokens, the same number
        atomicOr(members + token / 32 * capacity + rank, 1u << (token % 32));
      }
      token += token_step;  // of this lane's next entry
      column += 32 - token_step * width;
      if (column >= width) {
        column -= width;
        ++token;
      }
    });
  }
};

}  // namespace nsa::device
