#pragma once

#include "common/launch.cuh"
#include "sm80/selected_dq/kernel.cuh"

namespace nsa::sm80::selected_dq {

template <typename Config>
Status launch(const cuda::BackwardArgs& args, const cuda::Launch& device) {
  const int warps = Config::choose_warps(device.shared_memory);
  const int stages = Config::num_stages(device.shared_memory, warps);
  const int per_head = device::count_tiles_per_head(args.plan, warps);
  const int tiles = per_head * args.num_heads_k;
  return cuda::launch_kernel("selected attention dq", kernel<Config>,
                             dim3(tiles < device.num_sms ? tiles : device.num_sms),
                             32 * (warps + Config::kProducerWarps), Config::shared_bytes(stages, warps), device.stream,
                             args, stages, warps, per_head);
}

}  // namespace nsa::sm80::selected_dq

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv)                           \
  namespace nsa::cuda {                                             \
  Status name(const BackwardArgs& args, const Launch& device) {     \
    using namespace sm80::selected_dq;                              \
    return launch<Config<ElementOf_##dtype, dk, dv>>(args, device); \
  }                                                                 \
  }
