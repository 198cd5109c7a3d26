#pragma once

#include "common/launch.cuh"
#include "sm90/selected_dq/kernel.cuh"

namespace nsa::sm90::selected_dq {

template <typename Config>
Status launch_config(const cuda::BackwardArgs& args, const cuda::Launch& device) {
  constexpr const char* kWhat = "selected attention dq";
  CUtensorMap map;
  const Status status =
      cuda::make_tensor_map(kWhat, args.k, args.plan.total_k, args.num_heads_k, Config::kDk, Config::kKeys, &map);
  if (!status.ok()) return status;
  return cuda::launch_query_tiles(kWhat, kernel<Config>, cuda::block_ring_tiles<Config>(), args, device, map);
}

// The same whether 16 divides G or not.
template <typename Element, int kDk, int kDv>
KernelTiles tiles(const cuda::Launch&, int) {
  return cuda::block_ring_tiles<Config<Element, kDk, kDv, true>>();
}

template <typename Element, int kDk, int kDv>
Status launch(const cuda::BackwardArgs& args, const cuda::Launch& device) {
  return args.group % 16 == 0 ? launch_config<Config<Element, kDk, kDv, true>>(args, device)
                              : launch_config<Config<Element, kDk, kDv, false>>(args, device);
}

}  // namespace nsa::sm90::selected_dq

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv)                                                       \
  NSA_DEFINE_INSTANCE(name, BackwardArgs, sm90::selected_dq, launch<ElementOf_##dtype, dk, dv>) \
  NSA_DEFINE_TILES(name, sm90::selected_dq, tiles<ElementOf_##dtype, dk, dv>)
