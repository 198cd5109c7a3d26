#pragma once

#include "common/launch.cuh"
#include "sm80/selected_forward/kernel.cuh"

namespace nsa::sm80::selected_forward {

template <typename Config>
KernelTiles tiles(const cuda::Launch& device, int) {
  return cuda::key_ring_tiles<Config>(device, Config::choose_warps(device.shared_memory));
}

template <typename Config>
Status launch(const cuda::ForwardArgs& args, const cuda::Launch& device) {
  const KernelTiles t = tiles<Config>(device, args.group);
  return cuda::launch_query_tiles("selected attention forward", kernel<Config>, t, args, device, t.stages,
                                  t.query_rows / 16);
}

}  // namespace nsa::sm80::selected_forward

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv)                                                                   \
  NSA_DEFINE_INSTANCE(name, ForwardArgs, sm80::selected_forward, launch<Config<ElementOf_##dtype, dk, dv>>) \
  NSA_DEFINE_TILES(name, sm80::selected_forward, tiles<Config<ElementOf_##dtype, dk, dv>>)
