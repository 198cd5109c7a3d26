// The consumers of the Hopper forward: a warpgroup of four units (64 rows) goes through the blocks of its tile. What it
// computes is a Pass; the numbers that it gets are stages of the ring, of keys or of values:
//   start_scores(key_stage)      starts the product that weighs a block's keys, S
//   weigh(value_stage, flags)    turns it into the operand of the sum, P
//   start_sum(value_stage)       starts the sum over the block's keys, O += P V
//   score(key_stage)             S for one warp's unit, by mma.sync
//   add(value_stage, flags)      weighs it and adds P V
//   hold_scores(), hold_sum()    keep the compiler from touching either before its product is done
//
// A block's sum runs while the next block is looked for: without, the forward takes 2 % more. While a warpgroup weighs,
// the tensor cores are the others'.
//
// The tile's last blocks are those that no three units of a warpgroup share. There the warps part: each takes its own
// unit's alone, reads its own rows of Q alone, and goes on to the next tile's without the others. Up to as many blocks
// are at work as the ring has stages.
#pragma once

#include "device/tma_producer.cuh"
#include "device/warpgroup.cuh"

namespace nsa::device {

template <typename Shape>
struct StageWalk {
  BlockRing<Shape>& ring;
  unsigned units;  // this warpgroup's, as `any` bits
  int lane;
  int key_stage = 0, value_stage = 0;  // of the block that find() or next() found
  bool ended = false, alone = false;

  __device__ __forceinline__ StageWalk(BlockRing<Shape>& ring_, int warpgroup_, int lane_)
      : ring(ring_), units(0xfu << (4 * warpgroup_)), lane(lane_) {}

  // The flags of the tile's next block that concerns this warpgroup; 0: there is none, or it only comes when `held`,
  // the values of a block found before, have been released. A block found must be released, others already are.
  __device__ __forceinline__ unsigned find(int held) {
    while (!ended && !alone) {
      if (ring.value_stage == held) return 0;
      // through a shuffle, so that ptxas knows the branches to be uniform
      const unsigned flags = __shfl_sync(kFullWarp, ring.wait_for_block(), 0);
      alone = (flags & StageFlags::kAlone) != 0;
      if (alone) return 0;
      take(flags);
      if (flags & units) return flags;
      release_keys();
      release_values(value_stage);
    }
    return 0;
  }
  // The flags of the next block behind those that find() gave; it must be released. By each warp for itself.
  __device__ __forceinline__ unsigned next() {
    const unsigned flags = ring.wait_for_block();
    take(flags);
    return flags;
  }
  __device__ __forceinline__ void take(unsigned flags) {
    key_stage = ring.key_stage;
    value_stage = ring.value_stage;
    ended = (flags & StageFlags::kLast) != 0;
    ring.advance();
  }
  __device__ __forceinline__ void release_keys() const { ring.release_keys(key_stage, lane); }
  __device__ __forceinline__ void release_values(int stage) const { ring.release_values(stage, lane); }
};

template <typename Shape, typename Pass>
__device__ __forceinline__ void walk_stages(BlockRing<Shape>& ring, int warpgroup, int lane, Pass& pass) {
  StageWalk<Shape> walk(ring, warpgroup, lane);
  const auto score = [&] {
    wgmma_fence();
    pass.start_scores(walk.key_stage);
    wgmma_commit();
    wgmma_wait<0>();
    pass.hold_scores();
    walk.release_keys();
  };
  while (unsigned flags = walk.find(-1)) {
    score();
    while (true) {
      const int held = walk.value_stage;
      pass.weigh(held, flags);
      wgmma_fence();
      pass.start_sum(held);
      wgmma_commit();
      flags = walk.find(held);
      wgmma_wait<0>();
      pass.hold_sum();
      walk.release_values(held);
      if (!flags) break;
      score();
    }
  }
  sync_warpgroup(warpgroup);  // no product of the other warps reads this one's rows any more
  while (!walk.ended) {
    const unsigned flags = walk.next();
    const bool mine = (flags & pass.unit_flag()) != 0;
    if (mine) pass.score(walk.key_stage);
    __syncwarp();
    walk.release_keys();
    if (mine) pass.add(walk.value_stage, flags);
    __syncwarp();
    walk.release_values(walk.value_stage);
  }
}

}  // namespace nsa::device
