// The consumers of the Hopper forward: a warpgroup of four units (64 rows) goes through the stages of its tile. What it
// computes is a Pass:
//   start_scores(keys)         starts the product that weighs a block's keys, S
//   weigh(values, flags)       turns it into the operand of the sum, P, in registers that no product uses
//   settle()                   behind weigh, once no product is in flight: makes that operand the next sum's
//   start_sum(values)          starts the sum over the block's keys, O += P V
//   score(keys)                S for one warp's unit, by mma.sync
//   add(values, flags)         weighs it and adds P V
//   hold_scores(), hold_sum()  keep the compiler from touching either before its product is done
//
// While one stage is weighed, the tensor cores do the sum of the stage before: without that overlap the tensor cores
// stood still for a third of the time.
//
// The tile's last stages are those that no three units of a warpgroup share. There the warps part: each takes the
// stages of its own unit alone, reads its own rows of Q alone, and goes on to the next tile's without the others.
// Up to as many stages are at work as the ring has.
#pragma once

#include "device/tma_producer.cuh"
#include "device/warpgroup.cuh"

namespace nsa::device {

template <typename Shape>
struct StageWalk {
  BlockRing<Shape>& ring;
  unsigned mine;  // the `any` bits of this warpgroup's units
  int lane;
  int keys = 0, values = 0;  // stages of the block that find() found
  bool ended = false, alone = false;

  __device__ __forceinline__ StageWalk(BlockRing<Shape>& ring_, int warpgroup_, int lane_)
      : ring(ring_), mine(0xfu << (4 * warpgroup_)), lane(lane_) {}

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
      if (flags & mine) return flags;
      release_keys();
      release_values(values);
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
    keys = ring.key_stage;
    values = ring.value_stage;
    ended = (flags & StageFlags::kLast) != 0;
    ring.advance();
  }
  __device__ __forceinline__ void release_keys() const { ring.release_keys(keys, lane); }
  __device__ __forceinline__ void release_values(int stage) const { ring.release_values(stage, lane); }
};

template <typename Shape, typename Pass>
__device__ __forceinline__ void walk_stages(BlockRing<Shape>& ring, int warpgroup, int lane, Pass& pass) {
  StageWalk<Shape> walk(ring, warpgroup, lane);
  while (const unsigned first = walk.find(-1)) {
    wgmma_fence();
    pass.start_scores(walk.keys);
    wgmma_commit();
    wgmma_wait<0>();
    pass.hold_scores();
    walk.release_keys();
    pass.weigh(walk.values, first);
    pass.settle();
    int held = walk.values;
    while (const unsigned next = walk.find(held)) {
      pass.hold_sum();
      wgmma_fence();
      pass.start_scores(walk.keys);
      wgmma_commit();
      pass.start_sum(held);
      wgmma_commit();
      wgmma_wait<1>();
      pass.hold_scores();
      walk.release_keys();
      pass.weigh(walk.values, next);
      wgmma_wait<0>();
      pass.hold_sum();
      walk.release_values(held);
      pass.settle();
      held = walk.values;
    }
    pass.hold_sum();
    wgmma_fence();
    pass.start_sum(held);
    wgmma_commit();
    wgmma_wait<0>();
    pass.hold_sum();
    walk.release_values(held);
  }
  sync_warpgroup(warpgroup);  // no product of the other warps reads this one's rows any more
  while (!walk.ended) {
    const unsigned flags = walk.next();
    const bool mine = (flags & pass.unit_flag()) != 0;
    if (mine) pass.score(walk.keys);
    __syncwarp();
    walk.release_keys();
    if (mine) pass.add(walk.values, flags);
    __syncwarp();
    walk.release_values(walk.values);
  }
}

}  // namespace nsa::device
