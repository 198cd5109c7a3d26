#pragma once

#include "common/launch.cuh"
#include "sm80/selected_forward/kernel.cuh"

namespace nsa::sm80::selected_forward {

template <typename Config>
Status launch(const cuda::ForwardArgs& args, const cuda::Launch& device) {
  return cuda::launch_query_tiles<Config>("selected attention forward", kernel<Config>, args, device,
                                          Config::choose_warps(device.shared_memory));
}

}  // namespace nsa::sm80::selected_forward

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, ForwardArgs, sm80::selected_forward, launch<Config<ElementOf_##dtype, dk, dv>>)
