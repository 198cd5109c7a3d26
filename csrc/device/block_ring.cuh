// The ring of the Hopper kernels over query tiles: blocks that producer warps load in turn and every consumer warp
// passes in order.
//
// Keys and values have stages of their own, one more of values than of keys: while a product still reads a block's
// values, the stage of its keys already takes another block. With heads of 128 there are 5 and 6 where 5 for both
// fitted, with heads of 256 2 and 3 where 2 did.
#pragma once

#include "device/query_tile.cuh"

namespace nsa::device {

template <typename Shape>  // a QueryTileShape; kDv may be 0: keys alone
struct BlockRingShape : Shape {
  static constexpr int kSharedBytes = 227 * 1024;  // of a CTA, sm_90
  static constexpr bool kValues = Shape::kDv > 0;
  static constexpr int kValueBytes = Shape::kStageBytes - Shape::kKeyBytes;
  static constexpr int kMaxStages = kSharedBytes / Shape::kStageBytes;
  // Shared memory: places, barriers, infos, keys, values, consumers' own.
  static constexpr int kInfos = Shape::kBarriers + 8 * (3 * kMaxStages + 1);
  static constexpr int kKeysAt = (kInfos + 4 * Shape::kInfoWords * (kMaxStages + 1) + 1023) / 1024 * 1024;
  static constexpr int kOwnBytes = Shape::kMaxWarps * Shape::kWarpBytes;
  static constexpr int kKeyStages = (kSharedBytes - kKeysAt - kOwnBytes - kValueBytes) / Shape::kStageBytes;
  static constexpr int kValueStages = kKeyStages + (kValues ? 1 : 0);
  static constexpr int kValuesAt = kKeysAt + kKeyStages * Shape::kKeyBytes;
  static constexpr int kOwnAt = kValuesAt + kValueStages * kValueBytes;
  static constexpr int kUsedBytes = kOwnAt + kOwnBytes;
  // Producers at work: at most one a stage, so that a step is no longer than a lap.
  static constexpr int kProducers = Shape::kProducerWarps < kKeyStages ? Shape::kProducerWarps : kKeyStages;
  static_assert(kKeyStages >= 2, "loads and products would take turns");
};

template <typename Shape>  // a BlockRingShape
struct BlockRing {
  uint32_t shared;
  int key_stage = 0, value_stage = 0;  // whose turn it is
  unsigned key_phase = 0, value_phase = 0;

  explicit __device__ __forceinline__ BlockRing(const char* base) : shared(shared_address(base)) {}
  // Of the keys' stage s: a block's keys and values are there; its keys are done with.
  __device__ __forceinline__ uint32_t full(int s) const { return shared + Shape::kBarriers + 16 * s; }
  __device__ __forceinline__ uint32_t keys_empty(int s) const { return full(s) + 8; }
  __device__ __forceinline__ uint32_t keys(int s) const { return shared + Shape::kKeysAt + s * Shape::kKeyBytes; }
  // Of the values' stage s, which also says what block it is and whom it concerns.
  __device__ __forceinline__ uint32_t values_empty(int s) const { return full(Shape::kKeyStages) + 8 * s; }
  __device__ __forceinline__ uint32_t values(int s) const { return shared + Shape::kValuesAt + s * Shape::kValueBytes; }
  __device__ __forceinline__ uint32_t info(int s) const { return shared + Shape::kInfos + 4 * Shape::kInfoWords * s; }
  __device__ __forceinline__ uint32_t flags(int s) const { return info(s) + 4 * Shape::kParts * Shape::kPartWords; }
  __device__ __forceinline__ uint32_t own(int warp) const { return shared + Shape::kOwnAt + warp * Shape::kWarpBytes; }

  __device__ __forceinline__ void init() const {
    constexpr int kConsumers = Shape::kMaxWarps * kWarpArrivals;
    for (int s = 0; s < Shape::kKeyStages; ++s) {
      barrier_init(full(s), kWarpArrivals);
      barrier_init(keys_empty(s), kConsumers);
    }
    if constexpr (Shape::kValues) {
      for (int s = 0; s < Shape::kValueStages; ++s) barrier_init(values_empty(s), kConsumers);
    }
    publish_barriers();
  }
  // At most kKeyStages blocks on.
  __device__ __forceinline__ void advance(int by = 1) {
    key_stage += by;
    if (key_stage >= Shape::kKeyStages) {
      key_stage -= Shape::kKeyStages;
      key_phase ^= 1;
    }
    value_stage += by;
    if (value_stage >= Shape::kValueStages) {
      value_stage -= Shape::kValueStages;
      value_phase ^= 1;
    }
  }

  // By producers: until the stages whose turn it is may be filled, values behind keys. A parity can't tell the last lap
  // from the one two before, and other producers filled these stages in between. Keys are released in the order of
  // blocks: with at most a producer a stage, the lap before the last is over (waiting for the last block to have landed
  // is a precaution). Values are released out of turn, where a block is another warpgroup's; but a warp that has
  // released the keys of this stage holds no values of two laps before.
  __device__ __forceinline__ void wait_for_keys() const {
    barrier_wait(full(key_stage), key_phase ^ 1);
    barrier_wait(keys_empty(key_stage), key_phase ^ 1);
  }
  __device__ __forceinline__ void wait_for_values() const { barrier_wait(values_empty(value_stage), value_phase ^ 1); }
  // By a producer warp, behind its copies: makes the block known and goes on to its next.
  __device__ __forceinline__ void publish(unsigned flags_of_block, int lane) {
    __syncwarp();
    if (lane == 0) store_shared(flags(value_stage), static_cast<int>(flags_of_block));
    arrive_in_step(full(key_stage), lane);
    advance(Shape::kProducers);
  }

  // By consumers: until the block whose turn it is is there; returns its flags.
  __device__ __forceinline__ unsigned wait_for_block() const {
    barrier_wait(full(key_stage), key_phase);
    return load_shared(flags(value_stage));
  }
  // By a consumer warp that is done with what lies there, in step.
  __device__ __forceinline__ void release_keys(int s, int lane) const { arrive_in_step(keys_empty(s), lane); }
  __device__ __forceinline__ void release_values(int s, int lane) const { arrive_in_step(values_empty(s), lane); }
};

}  // namespace nsa::device
