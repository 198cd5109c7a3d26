// The unions of the query tiles' lists, one warp a tile, or a CTA for many tokens: gathered in shared memory where they
// fit, else walked.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>

#include "device/block_union.cuh"
#include "device/block_walk.cuh"

namespace nsa::cuda {
namespace {

using device::kFullWarp;

constexpr int kWarps = 4;
constexpr int kMaxTokens = 16 * device::StageFlags::kMaxUnits;  // of a tile
constexpr int kWords = kMaxTokens / 32;
// Of lists gathered in shared memory: what a CTA may have without asking, and entries a tile. Beyond them the lists are
// walked, as with G = 1 and more than 1700 blocks.
constexpr int kSharedBytes = 48 * 1024;
constexpr int kMaxEntries = 1 << 14;

// Tokens that a tile can touch: all of its rows, the first of which may be a token's last head.
int max_tokens(int warps, int group) { return (16 * warps + group - 2) / group + 1; }

// Any number of tokens, entries and blocks.
__global__ void __launch_bounds__(32 * kWarps) walk_unions(Plan plan, TileUnions unions, int num_tiles, Divisor group) {
  const int number = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (number >= num_tiles) return;
  const device::QueryTile tile(number, unions.tiles_per_head, unions.warps);
  const device::UnitTokens unit(plan, tile, unions.warps, group, lane);
  const int2 tokens = unit.of_tile;
  int32_t* entries = unions.entries + static_cast<int64_t>(number) * unions.capacity * unions.words;
  int2 count = {0, 0};
  if (tokens.y > 0) {
    device::BlockWalk<kWords> walk;
    walk.start(plan.lists + (static_cast<int64_t>(tile.head) * plan.total_q + tokens.x) * plan.list_width,
               plan.list_width, tokens.y, lane);
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
        const unsigned alone = unions.in_order ? 0 : device::StageFlags::alone(any_bits);
        if (lane == 2) word = static_cast<int>(any_bits | all_bits << device::StageFlags::kMaxUnits | alone);
        const int place = alone ? unions.capacity - 1 - count.y++ : count.x++;
        if (lane < unions.words) entries[static_cast<int64_t>(place) * unions.words + lane] = word;
        done += unions.part;
      } while (done < block.y);
    } while (walk.upcoming() != kNoBlock);
  }
  if (lane == 0) unions.counts[number] = count;
}

// An entry, by one lane; members: [words], `stride` apart.
template <bool kOneWord>
__device__ __forceinline__ void write_entry(int32_t* entry, int4 head, const unsigned* members, int stride, int words) {
  if constexpr (kOneWord) {
    head.w = static_cast<int>(*members);
    *reinterpret_cast<int4*>(entry) = head;
  } else {
    entry[0] = head.x;
    entry[1] = head.y;
    entry[2] = head.z;
    for (int w = 0; w < words; ++w) entry[3 + w] = static_cast<int>(members[w * stride]);
  }
}

// Warps that gather a tile's union: of the few tokens that G = 16 gives it one warp is enough. The 192 of G = 1 with 16
// entries each took one 60 us, and shared memory has no room for more tiles at a time.
constexpr int team_of(bool one_word) { return one_word ? 1 : kWarps; }

// What gather_unions is launched with.
struct Gathering {
  int capacity;      // blocks of a union
  int shared_bytes;  // a team
  int part_bits;     // parts a block, 2 to the power of
  int token_step;    // threads of a team / list width
};

// The same entries, as many at a time as a team has threads. At most kWarps warps a CTA.
template <bool kOneWord>
__global__ void __launch_bounds__(32 * kWarps, kOneWord ? 16 : 12)
    gather_unions(Plan plan, TileUnions unions, int num_tiles, Divisor group, Gathering args) {
  extern __shared__ __align__(16) char shared[];
  using device::StageFlags;
  using Union = device::BlockUnion<team_of(kOneWord)>;
  constexpr int kTeam = Union::kThreads;
  const int team = threadIdx.x / kTeam, thread = threadIdx.x % kTeam, lane = threadIdx.x % 32;
  const int number = blockIdx.x * (blockDim.x / kTeam) + team;
  if (number >= num_tiles) return;
  const device::QueryTile tile(number, unions.tiles_per_head, unions.warps);
  const int words = kOneWord ? 1 : unions.words - 3;
  const Union gathered(shared + team * args.shared_bytes, args.capacity, words, args.token_step);
  const device::UnitTokens unit(plan, tile, unions.warps, group, lane);
  const int2 tokens = unit.of_tile;
  int2 count = {0, 0};
  if (tokens.y > 0) {
    if (thread < StageFlags::kMaxUnits) gathered.set_unit(thread, unit);
    const int64_t list = static_cast<int64_t>(tile.head) * plan.total_q + tokens.x;
    int blocks = gathered.collect(plan.lists + list * plan.list_width, plan.list_width, tokens.y, thread);
    if (blocks == 0) {  // a tile with rows has at least one entry
      blocks = 1;
      if (thread == 0) gathered.blocks[0] = kNoBlock;
    }
    gathered.sync();
    int32_t* entries = unions.entries + static_cast<int64_t>(number) * unions.capacity * unions.words;
    for (int first = 0; first < blocks << args.part_bits; first += kTeam) {
      const int i = (first + thread) >> args.part_bits;
      const int done = (first + thread - (i << args.part_bits)) * unions.part;
      const int listed = i < blocks ? gathered.blocks[i] : kNoBlock;
      const int2 block = listed == kNoBlock ? int2{0, 0} : __ldg(plan.blocks + listed);
      const bool real = i < blocks && (done == 0 || done < block.y);
      const int key = block.x + done, valid = min(block.y - done, unions.part);
      unsigned flags = real ? gathered.template flags<kOneWord>(i, key + unions.part - 1) : 0;
      if (valid < unions.part) flags &= StageFlags::kAny;
      const unsigned alone = unions.in_order ? 0 : StageFlags::alone(flags);
      const unsigned front = __ballot_sync(kFullWarp, real && !alone), back = __ballot_sync(kFullWarp, real && alone);
      int2 before;
      const int2 sum = gathered.sums({__popc(front), __popc(back)}, thread, &before);
      if (real) {
        const unsigned below = (1u << lane) - 1;
        const int place = alone ? unions.capacity - 1 - count.y - before.y - __popc(back & below)
                                : count.x + before.x + __popc(front & below);
        write_entry<kOneWord>(entries + place * unions.words, {key, valid, static_cast<int>(flags | alone), 0},
                              gathered.members + i, args.capacity, words);
      }
      count.x += sum.x;
      count.y += sum.y;
    }
  }
  if (thread == 0) unions.counts[number] = count;
}

template <bool kOneWord>
void launch_unions(const Plan& plan, const TileUnions& unions, int tiles, Divisor group, cudaStream_t stream) {
  constexpr int kTeam = team_of(kOneWord);
  const int parts = plan.block_size / unions.part, capacity = unions.capacity / parts;
  const int64_t entries = static_cast<int64_t>(max_tokens(unions.warps, group)) * plan.list_width;
  const int64_t bytes = device::BlockUnion<kTeam>::shared_bytes(capacity, unions.words - 3);
  if (entries == 0 || entries > kMaxEntries || bytes > kSharedBytes) {
    walk_unions<<<(tiles + kWarps - 1) / kWarps, 32 * kWarps, 0, stream>>>(plan, unions, tiles, group);
    return;
  }
  const int shared = static_cast<int>(bytes), teams = std::min(kWarps / kTeam, kSharedBytes / shared);  // a CTA
  const Gathering args = {capacity, shared, std::countr_zero(static_cast<unsigned>(parts)),
                          32 * kTeam / plan.list_width};
  gather_unions<kOneWord>
      <<<(tiles + teams - 1) / teams, 32 * kTeam * teams, teams * shared, stream>>>(plan, unions, tiles, group, args);
}

}  // namespace

TileUnions carve_unions(const SelectedAttentionProblem& p, const Plan& plan, TileSize size, bool in_order,
                        Carver& carver) {
  TileUnions unions = {};
  unions.in_order = in_order;
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

Status make_unions(const Plan& plan, const TileUnions& unions, int num_heads_k, Divisor group, cudaStream_t stream) {
  const auto launch = unions.words == 3 + 1 ? launch_unions<true> : launch_unions<false>;
  launch(plan, unions, unions.tiles_per_head * num_heads_k, group, stream);
  return cuda_status(cudaGetLastError(), "selected attention: merging the block lists");
}

}  // namespace nsa::cuda
