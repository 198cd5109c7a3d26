// A tile of queries against the union of their blocks: what the forward and dQ of both families share.
//
// The (token, head of the group) pairs of one kv head are numbered through and cut into units of 16 rows (cuda::Units),
// one for each consumer warp: whatever G is, no row is padding but at a sequence's end. Producer warps walk the union
// of the tile's block lists and load every K/V block once into a ring of stages (key_ring.cuh on sm80, block_ring.cuh
// on sm90); a stage holds kKeys keys: a part of a block, or several blocks smaller than it. Each consumer warp skips
// the stages that none of its tokens chose and masks the rest row by row.
#pragma once

#include "common/kernel_args.h"
#include "device/row_stats.cuh"
#include "device/runs.cuh"
#include "device/tile.cuh"

namespace nsa::device {

template <int kDk_, int kDv_, int kKeys_, int kMaxWarps_, int kProducerWarps_, int kWarpBytes_, typename TileK_,
          typename TileV_>
struct QueryTileShape {
  static constexpr int kDk = kDk_, kDv = kDv_;
  using TileK = TileK_;  // how a stage's keys lie in shared memory
  using TileV = TileV_;
  static constexpr int kKeys = kKeys_;          // keys a stage
  static constexpr int kMaxWarps = kMaxWarps_;  // consumers
  static constexpr int kProducerWarps = kProducerWarps_;
  static constexpr int kWarpBytes = kWarpBytes_;  // a consumer's own shared memory, behind the ring
  static constexpr int kThreads = 32 * (kMaxWarps + kProducerWarps);
  static constexpr int kWords = (16 * kMaxWarps + 31) / 32;  // tokens of a tile, as bits
  static constexpr int kParts = kKeys / 16;                  // of 16 keys, the smallest block
  static constexpr int kKeyBytes = 2 * kKeys * kDk;
  static constexpr int kStageBytes = kKeyBytes + 2 * kKeys * kDv;

  // What a stage holds, in 32-bit words: for each of its blocks (or the part of one) the k row of the first key and the
  // tokens that chose it, as bits; behind them two words more.
  static constexpr int kPartWords = 1 + kWords;
  static constexpr int kInfoWords = kParts * kPartWords + 2;
  static constexpr int kBarriers = 8 * 16 * kMaxWarps;  // in shared memory, behind the {token, last key} of every row
};

// Where a unit of 16 rows lies among the tokens.
struct Unit {
  bool real;
  int first_token, first_group;  // of its first row: q row, and head in group
  int end_token;                 // behind the unit's run

  __device__ __forceinline__ Unit(const cuda::Units& units, int unit, const cuda::Divisor& group) {
    int run, begin, run_unit, runs = units.runs;
    if (units.unit_begin) {
      run = find_run(units.unit_begin, runs, unit);
      real = run < runs;
      begin = real ? __ldg(units.token_begin + run) : 0;
      end_token = real ? __ldg(units.token_begin + run + 1) : 0;
      run_unit = real ? unit - __ldg(units.unit_begin + run) : 0;
    } else {
      run = unit / units.units_per_run;
      real = run < runs;
      begin = run * units.tokens_per_run;
      end_token = begin + units.tokens_per_run;
      run_unit = unit - run * units.units_per_run;
    }
    const int in_run = 16 * run_unit / group;
    first_token = begin + in_run;
    first_group = 16 * run_unit - in_run * group;
  }
  __device__ __forceinline__ int last_token(const cuda::Divisor& group) const {
    return min(first_token + (first_group + 15) / group, end_token - 1);
  }
};

// One tile: a unit for each of its warps, of one kv head.
struct QueryTile {
  int head;  // kv head
  int first_unit;

  struct Row {
    bool real;
    int token, head;  // q row, query head
  };

  __device__ __forceinline__ QueryTile(int tile, const cuda::Divisor& tiles_per_head, int warps)
      : head(tile / tiles_per_head), first_unit((tile - head * tiles_per_head) * warps) {}

  // The tile's tokens follow each other, whatever sequences they belong to.
  __device__ __forceinline__ int2 tokens(const cuda::Units& units, int warps,
                                         const cuda::Divisor& group) const {  // {first, number}
    const Unit first(units, first_unit, group);
    if (!first.real) return {0, 0};
    int last_unit = first_unit + warps - 1;
    if (!Unit(units, last_unit, group).real)
      last_unit = (units.unit_begin ? __ldg(units.unit_begin + units.runs) : units.max_units) - 1;
    return {first.first_token, Unit(units, last_unit, group).last_token(group) + 1 - first.first_token};
  }
  // Row i of a unit.
  __device__ __forceinline__ Row row(const Unit& unit, int i, const cuda::Divisor& group) const {
    const int step = (unit.first_group + i) / group;
    const int token = unit.first_token + step;
    return {unit.real && token < unit.end_token, token, head * group + unit.first_group + i - step * group};
  }
};

// Which keys of a stage a lane's two rows (g and g + 8 of the warp's 16) see.
template <typename Shape>
struct Visibility {
  // Of the lane's two rows, in shared memory: {token of the tile, k row of the last key that it may see, -1 where the
  // row doesn't exist}. Four registers that the inner loop doesn't have.
  uint32_t places;
  // Keys seen of every 16 of the stage, 0 to 16, a byte each: they are the first ones of the 16, since a list names
  // whole blocks and causality and the sequence's end cut off the tail.
  int seen[2];
  static constexpr int kAll = 0x10101010u >> (32 - 8 * Shape::kParts);

  __device__ __forceinline__ Visibility(uint32_t shared, int warp, int lane)
      : places(shared + 8 * (16 * warp + lane / 4)) {}

  // Makes `places` those of the warp's rows; first_token: of the tile. By cp.async, since a last key takes 700 cycles
  // to come: a warp waits for its copies and is in step before it reads them, and behind its last look at the old ones.
  __device__ __forceinline__ void copy_rows(const QueryTile& tile, const Unit& unit, int first_token,
                                            const cuda::Plan& plan, const cuda::Divisor& group, int lane) const {
    if (lane >= 16) return;
    const QueryTile::Row row = tile.row(unit, lane, group);
    const uint32_t to = places + 8 * (lane - lane / 4);
    store_shared(to, row.real ? row.token - first_token : 0);
    if (row.real) {
      copy4_async(to + 4, plan.last_key + row.token, true);
    } else {
      store_shared(to + 4, -1);
    }
  }

  // False where the warp sees nothing of the stage that `info` describes; the same answer in all lanes. Most stages of
  // a tile are another warp's.
  __device__ __forceinline__ bool read(uint32_t info, int block_size) {
    const int2 place[2] = {load_shared_pair(places), load_shared_pair(places + 64)};
    if (block_size >= Shape::kKeys) {
      bool member[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) member[r] = is_member(info, place[r].x);
      if (!__any_sync(kFullWarp, member[0] || member[1])) return false;
      const int first = load_shared(info);
      const int keys[2] = {member[0] ? place[0].y - first + 1 : 0, member[1] ? place[1].y - first + 1 : 0};
      if (__all_sync(kFullWarp, min(keys[0], keys[1]) >= Shape::kKeys)) {  // most stages that aren't skipped
        seen[0] = seen[1] = kAll;
        return true;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        seen[r] = 0;
#pragma unroll
        for (int c = 0; c < Shape::kParts; ++c) seen[r] |= min(max(keys[r] - 16 * c, 0), 16) << (8 * c);
      }
    } else {
      const int part = min(block_size, Shape::kKeys);
      seen[0] = seen[1] = 0;
#pragma unroll
      for (int c = 0; c < Shape::kParts; ++c) {
        const int i = 16 * c / part;
        const uint32_t part_info = info + 4 * Shape::kPartWords * i;
        const int first = load_shared(part_info) + 16 * c - i * part;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int keys = is_member(part_info, place[r].x) ? min(max(place[r].y - first + 1, 0), 16) : 0;
          seen[r] |= keys << (8 * c);
        }
      }
    }
    return __any_sync(kFullWarp, (seen[0] | seen[1]) != 0);
  }

  __device__ __forceinline__ void set_everything() { seen[0] = seen[1] = kAll; }
  __device__ __forceinline__ bool everything() const { return seen[0] == kAll && seen[1] == kAll; }

  static __device__ __forceinline__ bool is_member(uint32_t info, int token) {
    return (load_shared(info + 4 + 4 * (token / 32)) >> (token % 32)) & 1;
  }

  // Whether row r sees column 8 n + 2 t + i of the stage.
  __device__ __forceinline__ bool sees(int r, int n, int i, int lane) const {
    return (n % 2) * 8 + 2 * (lane & 3) + i < ((seen[r] >> (8 * (n / 2))) & 0xff);
  }
};

}  // namespace nsa::device
