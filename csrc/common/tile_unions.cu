// The unions of the query tiles' lists: one warp a tile. 64 warps an SM hide the walk's latency, which a kernel's
// single producer warp can't.
#include <cuda_runtime.h>

#include "device/tile_union.cuh"

namespace nsa::cuda {
namespace {

using device::kFullWarp;

constexpr int kWarps = 4;
constexpr int kMaxTokens = 16 * device::StageFlags::kMaxUnits;  // of a tile
constexpr int kWords = kMaxTokens / 32;

// Tokens that a tile can touch: all of its rows, the first of which may be a token's last head.
int max_tokens(int warps, int group) { return (16 * warps + group - 2) / group + 1; }

__global__ void __launch_bounds__(32 * kWarps) walk_unions(Plan plan, TileUnions unions, int num_tiles, int group) {
  const int number = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (number >= num_tiles) return;
  const device::QueryTile tile(number, unions.tiles_per_head, unions.warps);
  const int2 tokens = tile.tokens(plan.units, unions.warps, group);
  int32_t* entries = unions.entries + static_cast<int64_t>(number) * unions.capacity * unions.words;
  int2 count = {0, 0};
  if (tokens.y > 0) {
    device::BlockWalk<kWords> walk;
    walk.start(plan.lists + (static_cast<int64_t>(tile.head) * plan.total_q + tokens.x) * plan.list_width,
               plan.list_width, tokens.y, lane);
    const device::UnitTokens unit(plan, tile, tokens.x, unions.warps, group, lane);
    do {  // a tile with rows has at least one entry
      const int2 block = walk.upcoming() == kNoBlock ? int2{0, 0} : __ldg(plan.blocks + walk.upcoming());
      const unsigned members = walk.next(lane);
      const unsigned mine = unit.of(members);
      int done = 0;
      do {
        const int valid = min(block.y - done, unions.part), key = block.x + done;
        const bool any = valid > 0 && mine != 0;
        const bool all = mine == unit.everybody() && valid == unions.part && key + unions.part - 1 <= unit.last_key;
        const unsigned any_bits = __ballot_sync(kFullWarp, any) & device::StageFlags::kAny;
        const unsigned all_bits = __ballot_sync(kFullWarp, all) & device::StageFlags::kAny;
        int word = __shfl_sync(kFullWarp, valid > 0 ? static_cast<int>(members) : 0, lane - 3);
        if (lane == 0) word = key;
        if (lane == 1) word = valid;
        const unsigned alone = device::StageFlags::alone(any_bits);
        if (lane == 2) word = static_cast<int>(any_bits | all_bits << device::StageFlags::kMaxUnits | alone);
        const int place = alone ? unions.capacity - 1 - count.y++ : count.x++;
        if (lane < unions.words) entries[static_cast<int64_t>(place) * unions.words + lane] = word;
        done += unions.part;
      } while (done < block.y);
    } while (walk.upcoming() != kNoBlock);
  }
  if (lane == 0) unions.counts[number] = count;
}

}  // namespace

TileUnions carve_unions(const SelectedAttentionProblem& p, const Plan& plan, TileSize size, Carver& carver) {
  TileUnions unions = {};
  const int tokens = max_tokens(size.warps, static_cast<int>(p.num_heads_q / p.num_heads_k));
  unions.warps = size.warps;
  unions.tiles_per_head = (plan.units.max_units + size.warps - 1) / size.warps;
  unions.part = plan.block_size < size.keys ? plan.block_size : size.keys;
  const int64_t listed = static_cast<int64_t>(tokens) * plan.list_width;
  const int64_t blocks = listed < plan.num_blocks ? listed : plan.num_blocks;
  unions.capacity = static_cast<int>(blocks > 0 ? blocks : 1) * (plan.block_size / unions.part);
  unions.words = 3 + (tokens + 31) / 32;
  const int64_t tiles = unions.tiles_per_head * p.num_heads_k;
  unions.entries = carver.take<int32_t>(tiles * unions.capacity * unions.words);
  unions.counts = carver.take<int2>(tiles);
  return unions;
}

Status make_unions(const Plan& plan, const TileUnions& unions, int num_heads_k, int group, cudaStream_t stream) {
  const int tiles = unions.tiles_per_head * num_heads_k;
  walk_unions<<<(tiles + kWarps - 1) / kWarps, 32 * kWarps, 0, stream>>>(plan, unions, tiles, group);
  return cuda_status(cudaGetLastError(), "selected attention: merging the block lists");
}

}  // namespace nsa::cuda
