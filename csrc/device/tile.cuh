// Tiles of 16-bit rows in shared memory and the three products that attention makes of them with m16n8k16 MMAs.
//
// Fragments of one warp (lane = 4 g + t): an accumulator acc[n][4] covers 16 x 8 elements: rows g (0, 1) and g + 8 (2,
// 3), columns 8 n + 2 t + {0, 1}.
#pragma once

#include "device/ptx.cuh"

namespace nsa::device {

// Rows of kDim elements, one behind the other. The 16-byte chunk c of row r lies at chunk c ^ (r & 7), so that the 8
// rows of an ldmatrix matrix hit 8 different bank groups.
template <int kDim>
struct Tile {
  static_assert(kDim % 64 == 0, "a row must be whole 128-byte lines for the swizzle");
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kBoxBytes = 128;  // from 64 columns to the next 64
  static constexpr int kChunks = kDim / 8;
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk / 8) * kBoxBytes + (((chunk ^ row) & 7) << 4);
  }
};

// The same as wgmma wants it: boxes of 64 columns, one behind the other, swizzled alike.
template <int kDim, int kRows>
struct BoxTile {
  static_assert(kDim % 64 == 0 && kRows % 8 == 0);
  static constexpr int kRowBytes = 128;
  static constexpr int kBoxBytes = kRows * kRowBytes;
  static constexpr int kChunks = kDim / 8;
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk / 8) * kBoxBytes + (((chunk ^ row) & 7) << 4);
  }
};

// Where a lane finds its row of an ldmatrix, for every second 16-byte chunk 2 i + (0 or 1): within 128 bytes the
// swizzle is an XOR of the address (tiles are 128-byte aligned), beyond them an immediate offset. So a stage costs four
// XORs, and nothing is worth keeping in registers from one stage to the next.
template <int kBoxBytes = 128>
struct MatrixRow {
  uint32_t address;
  __device__ __forceinline__ MatrixRow(uint32_t row, int odd, int lane) : address(row + ((odd ^ (lane & 7)) << 4)) {}
  __device__ __forceinline__ uint32_t operator()(int i) const {
    return (address ^ ((i & 3) << 5)) + (i >> 2) * kBoxBytes;
  }
};

// Copies rows into a Tile or BoxTile, spread over kThreads threads: eight share 128 bytes, so that the swizzle is the
// same in every row that a thread copies, and a 16-byte copy costs two instructions.
template <typename Tile, int kThreads>
struct RowCopy {
  static constexpr int kStep = kThreads / 8;  // rows a pass
  static_assert(kStep % 8 == 0);
  int64_t from;  // this thread's first chunk, in bytes from the tile's first row
  uint32_t to;   // the same in shared memory
  int row;

  __device__ __forceinline__ RowCopy(int64_t row_bytes, int thread)
      : from(thread / 8 * row_bytes + thread % 8 * 16), to(Tile::offset(thread / 8, thread % 8)), row(thread / 8) {}

  // kRows rows, all of which exist.
  template <int kRows>
  __device__ __forceinline__ void all(uint32_t tile, const char* source, int64_t row_bytes) const {
    const char* p = source + from;
#pragma unroll
    for (int pass = 0; pass < (kRows + kStep - 1) / kStep; ++pass) {
      if (kRows % kStep == 0 || row + pass * kStep < kRows) {
#pragma unroll
        for (int c = 0; c < Tile::kChunks / 8; ++c) {
          copy16_async(tile + to + pass * kStep * Tile::kRowBytes + c * Tile::kBoxBytes, p + 128 * c, true);
        }
      }
      p += kStep * row_bytes;
    }
  }

  // Rows >= valid become zeros (and aren't read).
  __device__ __forceinline__ void some(uint32_t tile, const char* source, int64_t row_bytes, int rows,
                                       int valid) const {
    const char* p = source + from;
    uint32_t t = tile + to;
#pragma unroll 1
    for (int r = row; r < rows; r += kStep) {
#pragma unroll
      for (int c = 0; c < Tile::kChunks / 8; ++c) copy16_async(t + c * Tile::kBoxBytes, p + 128 * c, r < valid);
      p += kStep * row_bytes;
      t += kStep * Tile::kRowBytes;
    }
  }
};

// a[16 x kDim] as A operand, kept in shared memory: one k-step of 16.
template <int kDim, typename Layout = Tile<kDim>>
struct SharedOperand {
  MatrixRow<Layout::kBoxBytes> row;
  __device__ __forceinline__ SharedOperand(uint32_t tile, int lane)
      : row(tile + ((lane & 7) + ((lane >> 3) & 1) * 8) * Layout::kRowBytes, lane >> 4, lane) {}
  __device__ __forceinline__ void load(uint32_t (&a)[4], int step) const { load_matrix(a, row(step)); }
};

// The same in registers.
template <int kDim>
struct RegisterOperand {
  uint32_t fragments[kDim / 16][4];
  __device__ __forceinline__ void load(uint32_t (&a)[4], int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = fragments[step][i];
  }
};

// acc[16 x kRows] += a[16 x kDim] tile[kRows x kDim]^T
template <typename Element, int kDim, int kRows, typename Layout = Tile<kDim>, typename Operand>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kRows / 8][4], const Operand& operand, uint32_t tile,
                                                    int lane) {
  const MatrixRow<Layout::kBoxBytes> row(tile + ((lane & 7) + (lane >> 4) * 8) * Layout::kRowBytes, (lane >> 3) & 1,
                                         lane);
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[4];
    operand.load(a, step);
    const uint32_t address = row(step);
#pragma unroll
    for (int n = 0; n < kRows / 16; ++n) {
      uint32_t b[4];
      load_matrix(b, address + n * 16 * Layout::kRowBytes);
      Half<Element>::mma(acc[2 * n], a, b[0], b[1]);
      Half<Element>::mma(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// acc[16 x kColumns] += a[16 x kRows] tile[kRows x kDim](:, 0 .. kColumns); tile may point at a later column, a
// multiple of 64.
template <typename Element, int kDim, int kRows, int kColumns, typename Layout = Tile<kDim>>
__device__ __forceinline__ void multiply(float (&acc)[kColumns / 8][4], const uint32_t (&a)[kRows / 16][4],
                                         uint32_t tile, int lane) {
  const MatrixRow<Layout::kBoxBytes> row(tile + ((lane & 7) + ((lane >> 3) & 1) * 8) * Layout::kRowBytes, lane >> 4,
                                         lane);
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      load_matrix_transposed(b, row(n) + step * 16 * Layout::kRowBytes);
      Half<Element>::mma(acc[2 * n], a[step], b[0], b[1]);
      Half<Element>::mma(acc[2 * n + 1], a[step], b[2], b[3]);
    }
  }
}

// An accumulator of 16 x kColumns, rounded, as the A operand of the next product.
template <typename Element, int kColumns>
__device__ __forceinline__ void round_to_operand(uint32_t (&a)[kColumns / 16][4], const float (&acc)[kColumns / 8][4]) {
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    a[step][0] = Half<Element>::pack(acc[2 * step][0], acc[2 * step][1]);
    a[step][1] = Half<Element>::pack(acc[2 * step][2], acc[2 * step][3]);
    a[step][2] = Half<Element>::pack(acc[2 * step + 1][0], acc[2 * step + 1][1]);
    a[step][3] = Half<Element>::pack(acc[2 * step + 1][2], acc[2 * step + 1][3]);
  }
}

template <typename T, int kColumns>
__device__ __forceinline__ void clear(T (&acc)[kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0;
  }
}

// Writes one of a lane's two rows of an accumulator, scaled; `to` is the row's first element. With `add` it is added to
// what stands there, all of which is read before: one trip to memory.
template <typename Element, int kColumns>
__device__ __forceinline__ void store_row(char* to, const float (&acc)[kColumns / 8][4], int half, float scale,
                                          int lane, bool add = false) {
  auto* const at = reinterpret_cast<uint32_t*>(to) + (lane & 3);
  uint32_t old[kColumns / 8];
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) old[n] = add ? at[4 * n] : 0;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    float2 sum = {acc[n][2 * half] * scale, acc[n][2 * half + 1] * scale};
    if (add) {
      const float2 pair = Half<Element>::unpack(old[n]);
      sum = {sum.x + pair.x, sum.y + pair.y};
    }
    at[4 * n] = Half<Element>::pack(sum.x, sum.y);
  }
}

// 4 x 4 words of the four lanes of a row, turned round: its own inverse. Every lane of the warp calls it.
__device__ __forceinline__ void transpose_words(uint32_t (&x)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? x[i] : x[i + 1], 1);
    (odd ? x[i] : x[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, high ? x[i] : x[i + 2], 2);
    (high ? x[i] : x[i + 2]) = other;
  }
}

// store_row() in 16-byte pieces, which the four lanes of a row first trade; every lane of the warp calls it.
template <typename Element, int kColumns>
__device__ __forceinline__ void store_row_wide(char* to, bool real, const float (&acc)[kColumns / 8][4], int half,
                                               float scale, int lane, bool add = false) {
  uint4* const at = reinterpret_cast<uint4*>(to + 16 * (lane & 3));
  uint4 old[kColumns / 32];
#pragma unroll
  for (int n = 0; n < kColumns / 32; ++n) old[n] = add && real ? at[4 * n] : uint4{0, 0, 0, 0};
#pragma unroll
  for (int n = 0; n < kColumns / 32; ++n) {
    float2 sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = {acc[4 * n + i][2 * half] * scale, acc[4 * n + i][2 * half + 1] * scale};
    uint32_t x[4];
    if (add) {
      x[0] = old[n].x, x[1] = old[n].y, x[2] = old[n].z, x[3] = old[n].w;
      transpose_words(x, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = Half<Element>::unpack(x[i]);
        sums[i] = {sums[i].x + pair.x, sums[i].y + pair.y};
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = Half<Element>::pack(sums[i].x, sums[i].y);
    transpose_words(x, lane);
    if (real) at[4 * n] = {x[0], x[1], x[2], x[3]};
  }
}

}  // namespace nsa::device
