#pragma once

#include "common/launch.cuh"
#include "sm90/selected_forward/kernel.cuh"

namespace nsa::sm90::selected_forward {

template <typename Config>
KernelTiles tiles(const cuda::Launch&, int) {
  return cuda::block_ring_tiles<Config>();
}

template <typename Config>
Status launch(const cuda::ForwardArgs& args, const cuda::Launch& device) {
  constexpr const char* kWhat = "selected attention forward";
  const int rows = args.plan.block_size < Config::kKeys ? args.plan.block_size : Config::kKeys;
  KeyMaps maps;
  Status status = cuda::make_tensor_map(kWhat, args.k, args.plan.total_k, args.num_heads_k, Config::kDk, rows, &maps.k);
  if (status.ok()) {
    status = cuda::make_tensor_map(kWhat, args.v, args.plan.total_k, args.num_heads_k, Config::kDv, rows, &maps.v);
  }
  if (!status.ok()) return status;
  return cuda::launch_query_tiles(kWhat, kernel<Config>, tiles<Config>(device, args.group), args, device, maps);
}

}  // namespace nsa::sm90::selected_forward

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv)                                                                   \
  NSA_DEFINE_INSTANCE(name, ForwardArgs, sm90::selected_forward, launch<Config<ElementOf_##dtype, dk, dv>>) \
  NSA_DEFINE_TILES(name, sm90::selected_forward, tiles<Config<ElementOf_##dtype, dk, dv>>)
