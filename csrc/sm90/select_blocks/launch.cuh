#pragma once

#include "common/launch.cuh"
#include "common/tensor_map.h"
#include "sm90/select_blocks/kernel.cuh"

namespace nsa::sm90::select_blocks {

template <typename Config>
Status launch(const cuda::SelectionArgs& a, const cuda::Launch& device) {
  constexpr const char* kWhat = "block selection";
  Maps maps = {};
  Status status = cuda::make_group_map(kWhat, a.q, a.plan.total_q, a.num_heads_k * a.group, Config::kDk, a.group,
                                       cuda::kSelectionRows, &maps.q);
  if (status.ok())
    status = cuda::make_tensor_map(kWhat, a.k, a.plan.total_k, a.num_heads_k, Config::kDk, 32, &maps.k, 4);
  if (!status.ok()) return status;
  const Layout layout = make_layout<Config>(a, device.shared_memory);
  return cuda::launch_kernel(kWhat, kernel<Config>, dim3(cuda::selection_ctas(a, device.num_sms)), Config::kThreads,
                             layout.bytes, device.stream, a, maps, layout);
}

}  // namespace nsa::sm90::select_blocks

// One compiled kernel; lines of instances.cmake become files that use this. Dv takes no part.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, SelectionArgs, sm90::select_blocks, launch<Config<ElementOf_##dtype, dk>>)
