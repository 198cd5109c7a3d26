#pragma once

#include "common/launch.cuh"
#include "sm80/selected_dq/kernel.cuh"

namespace nsa::sm80::selected_dq {

template <typename Config>
KernelTiles tiles(const cuda::Launch& device, int) {
  return cuda::key_ring_tiles<Config>(device, Config::choose_warps(device.shared_memory));
}

template <typename Config>
Status launch(const cuda::BackwardArgs& args, const cuda::Launch& device) {
  const KernelTiles t = tiles<Config>(device, args.group);
  return cuda::launch_query_tiles("selected attention dq", kernel<Config>, t, args, device, t.stages,
                                  t.query_rows / 16);
}

}  // namespace nsa::sm80::selected_dq

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv)                                                               \
  NSA_DEFINE_INSTANCE(name, BackwardArgs, sm80::selected_dq, launch<Config<ElementOf_##dtype, dk, dv>>) \
  NSA_DEFINE_TILES(name, sm80::selected_dq, tiles<Config<ElementOf_##dtype, dk, dv>>)
