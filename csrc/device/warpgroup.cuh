// What a consumer warpgroup of the Hopper kernels needs besides wgmma: its rows in shared memory, and which stages
// concern it.
#pragma once

#include "device/query_tile.cuh"
#include "device/wgmma.cuh"

namespace nsa::device {

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Waits for the four warps of a warpgroup. Barrier 0 is __syncthreads.
__device__ __forceinline__ void sync_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
}

// Copies a warp's unit of one tensor into rows 16 (warp % 4) .. of its warpgroup's BoxTile; rows that don't exist
// become zeros.
template <int kDim>
__device__ __forceinline__ void copy_unit(uint32_t boxes, const cuda::TensorArg& from, const QueryTile& tile,
                                          const Unit& unit, int group, int warp, int lane) {
  using Boxes = BoxTile<kDim, 64>;
  for (int i = lane; i < 16 * Boxes::kChunks; i += 32) {
    const int r = i / Boxes::kChunks, chunk = i - r * Boxes::kChunks;
    const QueryTile::Row row = tile.row(unit, r, group);
    const char* source = row.real ? from.at(row.token, row.head) + 16 * chunk : from.data;
    copy16_async(boxes + Boxes::offset(16 * (warp % 4) + r, chunk), source, row.real);
  }
}

// The tokens of a warpgroup's four units, as places in the tile: a stage that none of them chose is skipped by all four
// warps.
struct GroupTokens {
  int first, last;  // last < first: no real unit

  __device__ __forceinline__ GroupTokens(const cuda::Units& units, const QueryTile& tile, int warpgroup, int group) {
    const Unit begin(units, tile.first_unit + 4 * warpgroup, group);
    first = last = 0;
    if (!begin.real) {
      last = -1;
      return;
    }
    const int tile_token = Unit(units, tile.first_unit, group).first_token;
    first = begin.first_token - tile_token;
    last = first;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const Unit unit(units, tile.first_unit + 4 * warpgroup + u, group);
      if (unit.real) last = unit.last_token(group) - tile_token;
    }
  }

  // Whether any of them chose any block of the stage; the same answer in all four warps.
  template <typename Shape>
  __device__ __forceinline__ bool any(const KeyRing<Shape>& ring, int block_size) const {
    const int parts = block_size >= Shape::kKeys ? 1 : Shape::kKeys / block_size;
    unsigned found = 0;
    for (int i = 0; i < parts; ++i) {
      for (int word = first >> 5; word <= last >> 5; ++word) {
        unsigned wanted = 0xffffffffu;
        if (word == first >> 5) wanted &= 0xffffffffu << (first & 31);
        if (word == last >> 5) wanted &= 0xffffffffu >> (31 - (last & 31));
        found |= load_shared(ring.info() + 4 * Shape::kPartWords * i + 4 + 4 * word) & wanted;
      }
    }
    return __shfl_sync(kFullWarp, found, 0) != 0;  // through a shuffle, so that ptxas knows the branch to be uniform
  }
};

// acc[64 x 64 rows of b] = a b^T, both BoxTiles of 64 columns a box; a of 64 rows.
template <typename Element, int kDim, int kRows>
__device__ __forceinline__ void start_transposed(float (&acc)[kRows / 8][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    Wgmma<Element, kRows>::rows(acc, matrix_descriptor(a + step / 4 * BoxTile<kDim, 64>::kBoxBytes + step % 4 * 32),
                                matrix_descriptor(b + step / 4 * BoxTile<kDim, kRows>::kBoxBytes + step % 4 * 32),
                                step > 0);
  }
}

// acc[64 x kColumns] += a[64 x kRows] b; b a BoxTile of kRows rows, read from its first box on.
template <typename Element, int kRows, int kColumns>
__device__ __forceinline__ void start_columns(float (&acc)[kColumns / 8][4], const uint32_t (&a)[kRows / 16][4],
                                              uint32_t b) {
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    Wgmma<Element, kColumns>::columns(acc, a[step], matrix_descriptor(b + step * 16 * 128, kRows * 128));
  }
}

}  // namespace nsa::device
