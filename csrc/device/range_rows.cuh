// The query rows of a warp of the sm80 range kernels, in registers or in shared memory.
#pragma once

#include "device/range_tile.cuh"

namespace nsa::device {

// A warp's 16 rows of one tensor as A operand.
template <int kDim, bool kInRegisters>
struct RowOperand;

template <int kDim>
struct RowOperand<kDim, true> : RegisterOperand<kDim> {
  template <typename Queries>
  __device__ __forceinline__ void fetch(const cuda::TensorArg& from, const Queries& tile, const cuda::Divisor& group,
                                        uint32_t, int warp, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto row = tile.row(16 * warp + lane / 4 + 8 * r, group);
      const char* at = row.real ? from.at(row.token, row.head) + 4 * (lane & 3) : nullptr;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        this->fragments[step][r] = at ? __ldg(reinterpret_cast<const unsigned*>(at + 32 * step)) : 0;
        this->fragments[step][r + 2] = at ? __ldg(reinterpret_cast<const unsigned*>(at + 32 * step + 16)) : 0;
      }
    }
  }
};

template <int kDim>
struct RowOperand<kDim, false> {
  uint32_t at;
  int lane;
  template <typename Queries>
  __device__ __forceinline__ void fetch(const cuda::TensorArg& from, const Queries& tile, const cuda::Divisor& group,
                                        uint32_t to, int warp, int lane_) {
    constexpr int kChunks = Tile<kDim>::kChunks;
    at = to;
    lane = lane_;
    for (int i = lane; i < 16 * kChunks; i += 32) {
      const int r = i / kChunks, chunk = i - r * kChunks;
      const auto row = tile.row(16 * warp + r, group);
      const char* source = row.real ? from.at(row.token, row.head) + 16 * chunk : from.data;
      copy16_async(to + Tile<kDim>::offset(r, chunk), source, row.real);
    }
  }
  __device__ __forceinline__ void load(uint32_t (&a)[4], int step) const {
    SharedOperand<kDim>(at, lane).load(a, step);
  }
};

}  // namespace nsa::device
