// dQ of selected attention on Hopper: dQ = scale dS K, with the dS that dK's kernel left (BackwardArgs::ds). A tile of
// queries goes through the union of its blocks as in the forward, in ascending order, but loads only K, and each warp
// multiplies only what its own 16 rows chose. Nothing is computed twice: the backward is five products.
#pragma once

#include <type_traits>

#include "device/tma_producer.cuh"
#include "device/warpgroup.cuh"
#include "sm90/selected_dq/config.h"

namespace nsa::sm90::selected_dq {

using cuda::BackwardArgs;
using device::BlockRing;
using device::QueryTile;
using device::StageFlags;
using device::Unit;

// The tiles of a window: those whose last token lies in it, of every kv head.
struct WindowTiles {
  int first, per_window, per_head;
  int count;

  // The unit of a token's first row.
  static __device__ __forceinline__ int unit_of(const cuda::Units& units, int token, const cuda::Divisor& group) {
    int run, begin, first_unit;
    if (units.unit_begin) {
      run = device::find_run(units.token_begin, units.runs, token);
      begin = __ldg(units.token_begin + run);
      first_unit = __ldg(units.unit_begin + run);
    } else {
      run = token / units.tokens_per_run;
      begin = run * units.tokens_per_run;
      first_unit = run * units.units_per_run;
    }
    return first_unit + (token - begin) * group / 16;
  }

  __device__ __forceinline__ WindowTiles(const BackwardArgs& a, int warps, int per_head_) : per_head(per_head_) {
    const int window = a.index.window;
    const int64_t begin = static_cast<int64_t>(window) * a.index.windows.rows, end = begin + a.index.windows.rows;
    const auto tile_of = [&](int64_t token) { return unit_of(a.plan.units, static_cast<int>(token), a.group) / warps; };
    first = window ? tile_of(begin) : 0;
    per_window = (end < a.plan.total_q ? tile_of(end) : per_head) - first;
    count = per_window * a.num_heads_k;
  }
  __device__ __forceinline__ int number(int i) const {
    const int head = i / per_window;
    return head * per_head + first + i - head * per_window;
  }
};

// Where the dS of a token's blocks lie, one after the other in ascending order; those of more than 64 keys twice.
class PlaceWalk {
 public:
  __device__ __forceinline__ void start(const BackwardArgs& a, int head, bool real, int token) {
    places_ = a.index.places + (static_cast<int64_t>(head) * a.plan.total_q + (real ? token : 0)) * a.plan.list_width;
    entry_ = 0;
    second_ = false;
    at_ = real && a.plan.list_width > 0 ? __ldg(places_) : cuda::InvertedIndex::kNoPlace;
  }
  __device__ __forceinline__ bool ended() const { return at_ == cuda::InvertedIndex::kNoPlace; }
  __device__ __forceinline__ uint32_t place() const { return at_ & ~cuda::InvertedIndex::kTwoHalves; }
  __device__ __forceinline__ bool second_half() const { return second_; }
  __device__ __forceinline__ void next(const BackwardArgs& a) {
    second_ = !second_ && (at_ & cuda::InvertedIndex::kTwoHalves);
    if (!second_) at_ = ++entry_ < a.plan.list_width ? __ldg(places_ + entry_) : cuda::InvertedIndex::kNoPlace;
  }

 private:
  const uint32_t* places_;  // of the token's list
  int entry_;
  bool second_;
  uint32_t at_;
};

// dS of a unit's rows, slice by slice: 64 keys of each row, those of its next block. Loads are kDepth - 1 slices ahead
// of the products, by cp.async: from global memory into registers, ptxas waited for each load where the next was
// issued. In shared memory [kDepth, 16 rows, 128 bytes], chunk c of row m at c ^ 2 (m & 3).
//
// Every row goes through its own list; lanes l and l + 16 keep row l's place in it.
template <typename Config>
struct RowSlices {
  static constexpr int kDepth = Config::kDepth;
  uint32_t shared;
  int lane;
  PlaceWalk walk;  // to the slice to be asked for next
  bool real;
  int head;   // of the group
  int token;  // of the tile
  int asked;  // slices
  int used;   // of those multiplied

  __device__ __forceinline__ RowSlices(uint32_t shared_, int lane_) : shared(shared_), lane(lane_) {}

  __device__ __forceinline__ void start(const BackwardArgs& a, const QueryTile& tile, const Unit& unit) {
    const QueryTile::Row row = tile.row(unit, lane % 16, a.group);
    real = row.real;
    head = row.head - tile.head * a.group;
    token = real ? row.token - Unit(a.plan.units, tile.first_unit, a.group).first_token : 0;
    walk.start(a, tile.head, real, row.token);
    asked = used = 0;
    __syncwarp();  // every lane is done with the last tile's slices
#pragma unroll
    for (int i = 0; i < kDepth - 1; ++i) ask(a, true);
  }

  // Asks for the next slice of the rows that `mine` says.
  __device__ __forceinline__ void ask(const BackwardArgs& a, bool mine) {
    const bool wanted = mine && !walk.ended();
    const uint32_t row = walk.place() * static_cast<uint32_t>(static_cast<int>(a.group)) + head;
    const uint32_t slot = asked % kDepth;
    const unsigned rows = __ballot_sync(device::kFullWarp, wanted);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = lane / 8 + 4 * i;
      const uint32_t from = __shfl_sync(device::kFullWarp, row, m), to = __shfl_sync(device::kFullWarp, slot, m);
      const bool part = __shfl_sync(device::kFullWarp, walk.second_half(), m);
      const char* source = a.ds + (from + (part ? a.ds_rows : 0)) * int64_t{128} + 16 * (lane % 8);
      const uint32_t chunk = (lane % 8) ^ (2 * (m & 3));
      if (rows >> m & 1) device::copy16_async(shared + to * Config::kSliceBytes + m * 128 + (chunk << 4), source, true);
    }
    device::commit_copies();
    if (wanted) {
      ++asked;
      walk.next(a);
    }
  }

  // The slices of the rows that chose the stage's block, as mma's A operand; zeros for the others.
  __device__ __forceinline__ void take(const BackwardArgs& a, uint32_t info, uint32_t (&ds)[4][4]) {
    const bool member = real && device::Visibility<Config>::is_member(info, token);
    const unsigned members = __ballot_sync(device::kFullWarp, member);
    device::wait_copies_but<kDepth - 2>();
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = lane / 4 + 8 * r;
      const uint32_t slot = __shfl_sync(device::kFullWarp, used % kDepth, m);
      const uint32_t from = shared + slot * Config::kSliceBytes + m * 128 + 8 * (lane % 2);
      const bool mine = members >> m & 1;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t chunk = (2 * k + lane % 4 / 2) ^ (2 * (m & 3));
        const int2 pair = device::load_shared_pair(from + (chunk << 4));
        ds[k][r] = mine ? pair.x : 0;
        ds[k][2 + r] = mine ? pair.y : 0;
      }
    }
    used += member;
    ask(a, member);
  }
};

// The same where 16 divides G: a unit's rows are one token's, and a slice is 2 KB in one piece.
template <typename Config>
struct TokenSlices {
  static constexpr int kDepth = Config::kDepth;
  uint32_t to, from;   // this lane's part of the first slot, to fill and to read
  const char* source;  // of place 0
  PlaceWalk walk;
  int asked, used;

  __device__ __forceinline__ TokenSlices(uint32_t shared, int lane)
      : to(shared + lane / 8 * 128 + ((lane % 8 ^ 2 * (lane / 8)) << 4)),
        from(shared + lane / 4 * 128 + 8 * (lane % 2) + ((lane % 4 / 2 ^ 2 * (lane / 4 & 3)) << 4)) {}

  __device__ __forceinline__ void start(const BackwardArgs& a, const QueryTile& tile, const Unit& unit) {
    const int lane = threadIdx.x % 32;
    const bool real = unit.real && unit.first_token < unit.end_token;
    walk.start(a, tile.head, real, unit.first_token);
    source = a.ds + (unit.first_group + lane / 8) * 128 + 16 * (lane % 8);
    asked = used = 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kDepth - 1; ++i) ask(a);
  }

  __device__ __forceinline__ void ask(const BackwardArgs& a) {
    if (!walk.ended()) {
      const int64_t row = static_cast<int64_t>(walk.place()) * a.group + (walk.second_half() ? a.ds_rows : 0);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        device::copy16_async(to + asked % kDepth * Config::kSliceBytes + 512 * i, source + row * 128 + 512 * i, true);
      ++asked;
      walk.next(a);
    }
    device::commit_copies();
  }

  // By a warp whose token chose the stage's block.
  __device__ __forceinline__ void take(const BackwardArgs& a, uint32_t, uint32_t (&ds)[4][4]) {
    device::wait_copies_but<kDepth - 2>();
    __syncwarp();
    const uint32_t slice = from + used++ % kDepth * Config::kSliceBytes;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int2 pair = device::load_shared_pair((slice ^ (k << 5)) + 1024 * r);
        ds[k][r] = pair.x;
        ds[k][2 + r] = pair.y;
      }
    }
    ask(a);
  }
};

template <typename Config>
__device__ __forceinline__ void consume(const BackwardArgs& a, BlockRing<Config>& ring, const WindowTiles& tiles,
                                        const cuda::Divisor& tiles_per_head, int warp, int lane) {
  using Element = typename Config::Element;
  constexpr int kWarps = Config::kMaxWarps;
  std::conditional_t<Config::kWholeTokens, TokenSlices<Config>, RowSlices<Config>> slices(ring.own(warp), lane);
  const auto start = [&](int t) {
    const QueryTile tile(tiles.number(t), tiles_per_head, kWarps);
    slices.start(a, tile, Unit(a.plan.units, tile.first_unit + warp, a.group));
  };
  int t = blockIdx.x;
  if (t < tiles.count) start(t);
  for (; t < tiles.count; t += gridDim.x) {
    float dq[Config::kDk / 8][4];
    device::clear(dq);
    unsigned flags;
    do {
      flags = __shfl_sync(device::kFullWarp, ring.wait_for_block(), 0);
      if (flags & StageFlags::any(warp)) {
        uint32_t ds[4][4];
        slices.take(a, ring.info(ring.value_stage), ds);
        device::multiply<Element, Config::kDk, Config::kKeys, Config::kDk, typename Config::TileK>(
            dq, ds, ring.keys(ring.key_stage), lane);
      }
      __syncwarp();
      ring.release_keys(ring.key_stage, lane);
      ring.advance();
    } while (!(flags & StageFlags::kLast));
    if (t + gridDim.x < tiles.count) start(t + gridDim.x);
    const QueryTile tile(tiles.number(t), tiles_per_head, kWarps);
    const Unit unit(a.plan.units, tile.first_unit + warp, a.group);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryTile::Row row = tile.row(unit, lane / 4 + 8 * r, a.group);
      device::store_row_wide<Element, Config::kDk>(row.real ? a.dq.at(row.token, row.head) : nullptr, row.real, dq, r,
                                                   a.scale, lane, a.accumulate_dq);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    kernel(const __grid_constant__ BackwardArgs a, const __grid_constant__ CUtensorMap map,
           const __grid_constant__ cuda::Divisor tiles_per_head) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int kWarps = Config::kMaxWarps;
  const int warp = __shfl_sync(device::kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  BlockRing<Config> ring(shared);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  const WindowTiles tiles(a, kWarps, tiles_per_head);
  static_assert(Config::kProducers == Config::kProducerWarps, "all of them load");
  if (warp >= kWarps) {
    if constexpr (Config::kProducerWarps == 4) device::give_registers<Config::kProducerRegisters>();
    device::TmaProducer<Config>{a.unions, a.k, a.v, &map, nullptr, lane}.run(ring, warp - kWarps, tiles.count,
                                                                             [&](int t) { return tiles.number(t); });
  } else {
    if constexpr (Config::kProducerWarps == 4) device::take_registers<Config::kConsumerRegisters>();
    consume<Config>(a, ring, tiles, tiles_per_head, warp, lane);
  }
}

}  // namespace nsa::sm90::selected_dq
