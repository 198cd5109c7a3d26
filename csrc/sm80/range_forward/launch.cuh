#pragma once

#include "common/launch.cuh"
#include "sm80/range_forward/kernel.cuh"

namespace nsa::sm80::range_forward {

template <typename Config>
Status launch(const cuda::RangeForwardArgs& args, const cuda::Launch& device) {
  const int tiles = args.plan.units.max_units / args.plan.units.alignment;
  return cuda::launch_kernel("range attention forward", kernel<Config>, dim3(tiles * args.num_heads_k),
                             Config::kThreads, Config::kSharedBytes, device.stream, args, tiles);
}

}  // namespace nsa::sm80::range_forward

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, RangeForwardArgs, sm80::range_forward, launch<Config<ElementOf_##dtype, dk, dv>>)
