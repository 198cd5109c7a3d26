#pragma once

#include "common/launch.cuh"
#include "sm80/range_dkdv/kernel.cuh"

namespace nsa::sm80::range_dkdv {

template <typename Config>
Status launch(const cuda::RangeBackwardArgs& args, const cuda::Launch& device) {
  const int tiles = args.plan.key_units.max_units / args.plan.key_units.alignment;
  return cuda::launch_kernel("range attention dk, dv", kernel<Config>,
                             dim3(tiles, args.plan.max_chunks, args.num_heads_k), Config::kThreads,
                             Config::kSharedBytes, device.stream, args, tiles);
}

}  // namespace nsa::sm80::range_dkdv

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, RangeBackwardArgs, sm80::range_dkdv, launch<Config<ElementOf_##dtype, dk, dv>>)
