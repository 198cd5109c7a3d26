#pragma once

#include "common/launch.cuh"
#include "sm80/selected_dkdv/kernel.cuh"

namespace nsa::sm80::selected_dkdv {

template <typename Config>
KernelTiles tiles(const cuda::Launch& device, int) {
  const int stages = Config::num_stages(device.shared_memory);
  return {Config::kRows, Config::kKeys, stages, Config::kThreads, Config::shared_bytes(stages), 1};
}

template <typename Config>
Status launch(const cuda::BackwardArgs& args, const cuda::Launch& device) {
  const KernelTiles t = tiles<Config>(device, args.group);
  const int key_parts = (args.plan.block_size + Config::kKeys - 1) / Config::kKeys;
  return cuda::launch_kernel("selected attention dk, dv", kernel<Config>,
                             dim3(static_cast<unsigned>(args.index.max_items), key_parts), t.threads, t.shared_memory,
                             device.stream, args, t.stages);
}

}  // namespace nsa::sm80::selected_dkdv

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv)                                                                 \
  NSA_DEFINE_INSTANCE(name, BackwardArgs, sm80::selected_dkdv, launch<Config<ElementOf_##dtype, dk, dv>>) \
  NSA_DEFINE_TILES(name, sm80::selected_dkdv, tiles<Config<ElementOf_##dtype, dk, dv>>)
