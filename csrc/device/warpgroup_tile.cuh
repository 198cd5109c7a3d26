// The consumers of the Hopper forward: a warpgroup of four units (64 rows) goes through the stages of its tile. What it
// computes is a Pass:
//   start_scores(stage)        starts the product that weighs a stage's keys, S
//   weigh(stage, flags)        turns it into the operand of the sum, P, in registers that no product uses
//   settle()                   behind weigh, once no product is in flight: makes that operand the next sum's
//   start_sum(stage)           starts the sum over the stage's keys, O += P V
//   attend(stage, flags)       all of that for one warp's unit, by mma.sync
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
  KeyRing<Shape>& ring;
  unsigned mine;  // the `any` bits of this warpgroup's units
  int lane;
  int stage = 0;  // of what find() found
  bool ended = false, alone = false;

  __device__ __forceinline__ StageWalk(KeyRing<Shape>& ring_, int warpgroup_, int lane_)
      : ring(ring_), mine(0xfu << (4 * warpgroup_)), lane(lane_) {}

  // The flags of the tile's next stage that concerns this warpgroup; 0: there is none, or it only comes when `held`, a
  // stage found before, has been released. A stage found must be released, others already are.
  __device__ __forceinline__ unsigned find(int held) {
    while (!ended && !alone) {
      if (ring.stage == held) return 0;
      barrier_wait(ring.full(), ring.phase);
      // through a shuffle, so that ptxas knows the branches to be uniform
      const unsigned flags = __shfl_sync(kFullWarp, load_shared(ring.flags()), 0);
      alone = (flags & StageFlags::kAlone) != 0;
      if (alone) return 0;
      take(flags);
      if (flags & mine) return flags;
      release(stage);
    }
    return 0;
  }
  // The flags of the next stage behind those that find() gave; it must be released. By each warp for itself.
  __device__ __forceinline__ unsigned next() {
    barrier_wait(ring.full(), ring.phase);
    const unsigned flags = load_shared(ring.flags());
    take(flags);
    return flags;
  }
  __device__ __forceinline__ void take(unsigned flags) {
    stage = ring.stage;
    ended = (flags & StageFlags::kLast) != 0;
    ring.advance();
  }
  __device__ __forceinline__ void release(int done) const { arrive_in_step(ring.empty(done), lane); }
};

template <typename Shape, typename Pass>
__device__ __forceinline__ void walk_stages(KeyRing<Shape>& ring, int warpgroup, int lane, Pass& pass) {
  StageWalk<Shape> walk(ring, warpgroup, lane);
  while (const unsigned first = walk.find(-1)) {
    wgmma_fence();
    pass.start_scores(walk.stage);
    wgmma_commit();
    wgmma_wait<0>();
    pass.hold_scores();
    pass.weigh(walk.stage, first);
    pass.settle();
    int held = walk.stage;
    while (const unsigned next = walk.find(held)) {
      pass.hold_sum();
      wgmma_fence();
      pass.start_scores(walk.stage);
      wgmma_commit();
      pass.start_sum(held);
      wgmma_commit();
      wgmma_wait<1>();
      pass.hold_scores();
      pass.weigh(walk.stage, next);
      wgmma_wait<0>();
      pass.hold_sum();
      walk.release(held);
      pass.settle();
      held = walk.stage;
    }
    pass.hold_sum();
    wgmma_fence();
    pass.start_sum(held);
    wgmma_commit();
    wgmma_wait<0>();
    pass.hold_sum();
    walk.release(held);
  }
  sync_warpgroup(warpgroup);  // no product of the other warps reads this one's rows any more
  while (!walk.ended) {
    const unsigned flags = walk.next();
    if (flags & pass.unit_flag()) pass.attend(walk.stage, flags);
    __syncwarp();
    walk.release(walk.stage);
  }
}

}  // namespace nsa::device
