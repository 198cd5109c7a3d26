// What a consumer warpgroup of the Hopper kernels needs besides wgmma: its rows in shared memory.
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

// Copies a warp's unit of one tensor into rows 16 (warp % 4) .. of its warpgroup's BoxTile; rows that don't exist
// become zeros. Eight lanes take a row, four rows at a time, with one division a lane: later rows follow from its
// first.
template <int kDim>
__device__ __forceinline__ void copy_unit(uint32_t boxes, const cuda::TensorArg& from, const QueryTile& tile,
                                          const Unit& unit, const cuda::Divisor& group, int warp, int lane) {
  using Boxes = BoxTile<kDim, 64>;
  const int first = lane / 8, chunk = lane % 8;
  QueryTile::Row row = tile.row(unit, first, group);
  int in_group = row.head - tile.head * group;
#pragma unroll 1  // the last tile's O is still in registers
  for (int r = 0; r < 16; r += 4) {
    const char* source = from.data;
    if (row.real) source = from.at(row.token, row.head) + 16 * chunk;
    const uint32_t to = boxes + Boxes::offset(16 * (warp % 4) + first + r, chunk);
#pragma unroll
    for (int c = 0; c < kDim / 64; ++c) copy16_async(to + c * Boxes::kBoxBytes, source + 128 * c, row.real);
    row.head += 4;
    for (in_group += 4; in_group >= group; in_group -= group) {
      row.head -= group;
      ++row.token;
    }
    row.real = unit.real && row.token < unit.end_token;
  }
}

// kRows rows (token * G + head of the group) into a BoxTile<kDim, kRows>; head: the first row's.
template <int kDim, int kRows>
__device__ __forceinline__ void copy_queries(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                             const cuda::TensorArg& from, int token, int head) {
  const int2 place = from.batch_and_row(token);
#pragma unroll
  for (int c = 0; c < kDim / 64; ++c)
    copy_box_async(to + c * BoxTile<kDim, kRows>::kBoxBytes, map, barrier, 64 * c, head, place.y, place.x);
}

// A descriptor that ptxas knows to be the same in all lanes: steps along the operand are then additions to a uniform
// register, where they took ten instructions each.
__device__ __forceinline__ uint64_t uniform_descriptor(uint32_t shared, uint32_t leading = 16) {
  return whole_descriptor(__shfl_sync(kFullWarp, low_descriptor(shared, leading), 0));
}
// `bytes` further; the address counts 16 bytes and stays below 256 KiB.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return whole_descriptor(static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// acc[64 x 64 rows of b] = a b^T, both BoxTiles of 64 columns a box; a of 64 rows.
template <typename Element, int kDim, int kRows>
__device__ __forceinline__ void start_transposed(float (&acc)[kRows / 8][4], uint32_t a, uint32_t b) {
  // a stays the same from stage to stage: its low word, made before the shuffle, would be kept in a register
  const uint64_t from_a = matrix_descriptor(__shfl_sync(kFullWarp, a, 0)), from_b = uniform_descriptor(b);
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    Wgmma<Element, kRows>::rows(acc, advance(from_a, step / 4 * BoxTile<kDim, 64>::kBoxBytes + step % 4 * 32),
                                advance(from_b, step / 4 * BoxTile<kDim, kRows>::kBoxBytes + step % 4 * 32), step > 0);
  }
}

// acc[64 x kColumns] += a[64 x kRows] b; b a BoxTile of kRows rows, read from its first box on.
template <typename Element, int kRows, int kColumns>
__device__ __forceinline__ void start_columns(float (&acc)[kColumns / 8][4], const uint32_t (&a)[kRows / 16][4],
                                              uint32_t b) {
  const uint64_t from_b = uniform_descriptor(b, kRows * 128);
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    Wgmma<Element, kColumns>::columns(acc, a[step], advance(from_b, step * 16 * 128));
  }
}

}  // namespace nsa::device
