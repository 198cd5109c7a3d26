#pragma once

#include "common/launch.cuh"
#include "common/tensor_map.h"
#include "sm90/range_dkdv/kernel.cuh"

namespace nsa::sm90::range_dkdv {

template <typename Config>
Status launch(const cuda::RangeBackwardArgs& a, const cuda::Launch& device) {
  constexpr const char* kWhat = "range attention dk, dv";
  const int tiles = a.plan.key_units.max_units / a.plan.key_units.alignment;
  const int heads = a.num_heads_k * a.group;
  Maps maps = {};
  Status status = cuda::make_tensor_map(kWhat, a.k, a.plan.total_k, a.num_heads_k, Config::kDk, 64, &maps.k);
  if (status.ok()) status = cuda::make_tensor_map(kWhat, a.v, a.plan.total_k, a.num_heads_k, Config::kDv, 64, &maps.v);
  if (status.ok() && a.plan.total_q > 0) {
    status = cuda::make_group_map(kWhat, a.q, a.plan.total_q, heads, Config::kDk, a.group, Config::kRows, &maps.q);
    if (status.ok()) {
      status =
          cuda::make_group_map(kWhat, a.dout, a.plan.total_q, heads, Config::kDv, a.group, Config::kRows, &maps.dout);
    }
  }
  if (!status.ok()) return status;
  return cuda::launch_kernel(kWhat, kernel<Config>, dim3(tiles, a.plan.max_chunks, a.num_heads_k), Config::kThreads,
                             Config::kSharedBytes, device.stream, a, maps);
}

}  // namespace nsa::sm90::range_dkdv

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, RangeBackwardArgs, sm90::range_dkdv, launch<Config<ElementOf_##dtype, dk, dv>>)
