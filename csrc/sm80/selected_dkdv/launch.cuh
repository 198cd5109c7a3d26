#pragma once

#include "common/launch.cuh"
#include "sm80/selected_dkdv/kernel.cuh"

namespace nsa::sm80::selected_dkdv {

template <typename Config>
Status launch(const cuda::BackwardArgs& args, const cuda::Launch& device) {
  const int stages = Config::num_stages(device.shared_memory);
  const int key_parts = (args.plan.block_size + Config::kKeys - 1) / Config::kKeys;
  return cuda::launch_kernel("selected attention dk, dv", kernel<Config>,
                             dim3(static_cast<unsigned>(args.index.max_items), key_parts), Config::kThreads,
                             Config::shared_bytes(stages), device.stream, args, stages);
}

}  // namespace nsa::sm80::selected_dkdv

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, BackwardArgs, sm80::selected_dkdv, launch<Config<ElementOf_##dtype, dk, dv>>)
