#pragma once

#include "common/launch.cuh"
#include "sm80/range_dq/kernel.cuh"

namespace nsa::sm80::range_dq {

template <typename Config>
Status launch(const cuda::RangeBackwardArgs& args, const cuda::Launch& device) {
  const int tiles = args.plan.units.max_units / args.plan.units.alignment;
  return cuda::launch_kernel("range attention dq", kernel<Config>, dim3(tiles * args.num_heads_k), Config::kThreads,
                             Config::kSharedBytes, device.stream, args, tiles);
}

}  // namespace nsa::sm80::range_dq

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, RangeBackwardArgs, sm80::range_dq, launch<Config<ElementOf_##dtype, dk, dv>>)
