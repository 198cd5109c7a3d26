// The union of the block lists of a tile's tokens, all of it at once, in shared memory: threads mark the listed blocks
// as bits of a window of 1024, and an entry's place is the number of marks before its block. A thread then describes a
// block by itself. By the machine code 1500 instructions for 12 tokens of 16 entries with a union of 129, and 870 with
// one of 30; a walk (BlockWalk) takes 16600 and 4300, and instructions, not latency, are what it waits for.
#pragma once

#include "device/tile_union.cuh"
#include "device/warp_scan.cuh"

namespace nsa::device {

// kWarps: one warp works on it, or all of a CTA, whose threads all call collect().
template <int kWarps>
struct BlockUnion {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWindow = 32 * 32;  // blocks: a word a lane of the first warp
  // Entries of a thread whose reads are under way at a time. 12 tokens of 16 give a lane 6, 8 give 4.
  static constexpr int kAhead = kWarps == 1 ? 2 : 8;

  // One unit's tokens as bits of two of the tile's words, and the last key that all of them see.
  struct alignas(16) UnitBits {
    unsigned low;
    int last_key;
    unsigned high;
    int word;  // that `low` belongs to
  };

  UnitBits* units;      // [kMaxUnits]
  uint2* window;        // [32] {which of 32 blocks are marked, the union's blocks before them}
  int2* slots;          // [kWarps] what warps tell each other, where there are several
  int* blocks;          // [capacity] the union, ascending
  unsigned* members;    // [words, capacity] which tokens chose a block, as bits
  int capacity, words;  // blocks, 32-bit words of tokens
  int token_step;       // kThreads / list width

  // Bytes of shared memory, a multiple of 16.
  static __host__ __device__ __forceinline__ int64_t shared_bytes(int capacity, int words) {
    const int64_t fixed = StageFlags::kMaxUnits * sizeof(UnitBits) + 32 * sizeof(uint2) + kSlotBytes;
    return fixed + (static_cast<int64_t>(capacity) * (1 + words) + 3) / 4 * 16;
  }

  __device__ __forceinline__ BlockUnion(char* shared, int capacity_, int words_, int token_step_)
      : capacity(capacity_), words(words_), token_step(token_step_) {
    units = reinterpret_cast<UnitBits*>(shared);
    window = reinterpret_cast<uint2*>(units + StageFlags::kMaxUnits);
    slots = reinterpret_cast<int2*>(window + 32);
    blocks = reinterpret_cast<int*>(reinterpret_cast<char*>(slots) + kSlotBytes);
    members = reinterpret_cast<unsigned*>(blocks + capacity);
  }

  // By lane u, of unit u.
  __device__ __forceinline__ void set_unit(int u, const UnitTokens& unit) const {
    const unsigned long long bits = static_cast<unsigned long long>(unit.everybody()) << (unit.first % 32);
    units[u] = {static_cast<unsigned>(bits), unit.last_key, static_cast<unsigned>(bits >> 32), unit.first / 32};
  }

  // lists: of the first token, [tokens, width]. Fills blocks and members and returns the number of blocks. A window
  // begins at the smallest block that is left, so sequences far apart cost no empty ones.
  __device__ __forceinline__ int collect(const int32_t* lists, int width, int num_tokens, int thread) const {
    int4* clear = reinterpret_cast<int4*>(blocks);
#pragma unroll 1
    for (int i = thread; i < (capacity * (1 + words) + 3) / 4; i += kThreads) clear[i] = {0, 0, 0, 0};
    int smallest = cuda::kNoBlock, count = 0;
#pragma unroll 1
    for (int t = thread; t < num_tokens; t += kThreads) smallest = min(smallest, __ldg(lists + t * width));
    int base = smallest_of_all(smallest, thread);
    while (base != cuda::kNoBlock) {
      if (thread < 32) window[thread].x = 0;
      sync();
      const int next = mark(lists, num_tokens * width, base, thread);
      sync();
      if (thread < 32) {
        const int marked = __popc(window[thread].x);
        window[thread].y = count + sum_up_to_lane(marked, thread) - marked;
      }
      sync();
      place(lists, width, num_tokens * width, base, thread);
      const uint2 last = window[31];
      count = last.y + __popc(last.x);
      base = smallest_of_all(next, thread);
      sync();
    }
    return count;
  }

  // The sum of all warps' numbers, and that of the warps before the thread's.
  __device__ __forceinline__ int2 sums(int2 of_warp, int thread, int2* before) const {
    *before = {0, 0};
    if constexpr (kWarps == 1) return of_warp;
    if (thread % 32 == 0) slots[thread / 32] = of_warp;
    sync();
    int2 sum = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == thread / 32) *before = sum;
      sum = {sum.x + slots[w].x, sum.y + slots[w].y};
    }
    sync();
    return sum;
  }

  __device__ __forceinline__ void sync() const {
    if constexpr (kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
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
  static constexpr int kSlotBytes = kWarps == 1 ? 0 : (8 * kWarps + 15) / 16 * 16;

  // Slots are written again behind a sync().
  __device__ __forceinline__ int smallest_of_all(int value, int thread) const {
    value = __reduce_min_sync(kFullWarp, value);
    if constexpr (kWarps > 1) {
      if (thread % 32 == 0) slots[thread / 32].x = value;
      sync();
#pragma unroll
      for (int w = 0; w < kWarps; ++w) value = min(value, slots[w].x);
    }
    return value;
  }

  template <typename Function>
  static __device__ __forceinline__ void for_entries(const int32_t* lists, int entries, int thread, Function function) {
#pragma unroll 1
    for (int first = 0; first < entries; first += kThreads * kAhead) {
      int block[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int i = first + kThreads * a + thread;
        block[a] = i < entries ? __ldg(lists + i) : cuda::kNoBlock;
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) function(block[a]);
    }
  }

  // Marks the entries of the window from `base` on; returns the smallest that this thread saw behind it.
  __device__ __forceinline__ int mark(const int32_t* lists, int entries, int base, int thread) const {
    int next = cuda::kNoBlock;
    for_entries(lists, entries, thread, [&](int block) {
      const unsigned offset = block - base;  // huge for those of an earlier window
      if (block >= base + kWindow) next = min(next, block);
      if (offset < kWindow) atomicOr(&window[offset / 32].x, 1u << (offset % 32));
    });
    return next;
  }

  // Puts the entries of the window, with their tokens, where the marks before them say.
  __device__ __forceinline__ void place(const int32_t* lists, int width, int entries, int base, int thread) const {
    unsigned token = static_cast<unsigned>(thread) / width, column = thread - token * width;
    for_entries(lists, entries, thread, [&](int block) {
      const unsigned offset = block - base;
      if (offset < kWindow) {
        const uint2 word = window[offset / 32];
        const int rank = word.y + __popc(word.x & ((1u << (offset % 32)) - 1));
        atomicOr(blocks + rank, block);  // by several tokens, the same number
        atomicOr(members + token / 32 * capacity + rank, 1u << (token % 32));
      }
      token += token_step;  // of this thread's next entry
      column += kThreads - token_step * width;
      if (column >= width) {
        column -= width;
        ++token;
      }
    });
  }
};

}  // namespace nsa::device
