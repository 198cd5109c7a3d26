#pragma once

#include "common/launch.cuh"
#include "common/tensor_map.h"
#include "sm90/range_forward/kernel.cuh"

namespace nsa::sm90::range_forward {

template <typename Config>
Status launch(const cuda::RangeForwardArgs& a, const cuda::Launch& device) {
  constexpr const char* kWhat = "range attention forward";
  const int tiles = a.plan.units.max_units / a.plan.units.alignment, all = tiles * a.num_heads_k;
  Maps maps = {};
  Status status =
      cuda::make_group_map(kWhat, a.q, a.plan.total_q, a.num_heads_k * a.group, Config::kDk, a.group, 64, &maps.q);
  if (status.ok() && a.plan.total_k > 0) {
    status = cuda::make_tensor_map(kWhat, a.k, a.plan.total_k, a.num_heads_k, Config::kDk, Config::kKeys, &maps.k);
    if (status.ok())
      status = cuda::make_tensor_map(kWhat, a.v, a.plan.total_k, a.num_heads_k, Config::kDv, Config::kKeys, &maps.v);
  }
  if (!status.ok()) return status;
  return cuda::launch_kernel(kWhat, kernel<Config>, dim3(all < device.num_sms ? all : device.num_sms), Config::kThreads,
                             Config::kSharedBytes, device.stream, a, maps, tiles);
}

}  // namespace nsa::sm90::range_forward

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, RangeForwardArgs, sm90::range_forward, launch<Config<ElementOf_##dtype, dk, dv>>)
