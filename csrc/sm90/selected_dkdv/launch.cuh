#pragma once

#include "common/launch.cuh"
#include "sm90/selected_dkdv/kernel.cuh"

namespace nsa::sm90::selected_dkdv {

inline constexpr const char* kWhat = "selected attention dk, dv";

// Boxes hold the largest power of two of heads that divides G, at most the 16 rows of a warp. box_heads is 0 where that
// is too few, or TMA can't describe the tensors (a stride too long, say).
template <typename Config>
RowMaps make_row_maps(const cuda::BackwardArgs& a) {
  RowMaps maps = {};
  const int box = (a.group | 16) & -(a.group | 16);
  if (box < Config::kMinBoxHeads || a.plan.total_q == 0) return maps;
  const int heads = a.num_heads_k * a.group;
  if (cuda::make_group_map(kWhat, a.q, a.plan.total_q, heads, Config::kDk, box, box, &maps.q).ok() &&
      cuda::make_group_map(kWhat, a.dout, a.plan.total_q, heads, Config::kDv, box, box, &maps.dout).ok()) {
    maps.box_heads = box;
  }
  return maps;
}

template <typename Config>
Status launch_config(const cuda::BackwardArgs& args, const RowMaps& maps, const cuda::Launch& device) {
  const int stages = Config::num_stages(device.shared_memory);
  const int key_parts = (args.plan.block_size + Config::kKeys - 1) / Config::kKeys;
  return cuda::launch_kernel(kWhat, kernel<Config>, dim3(static_cast<unsigned>(args.index.max_items), key_parts),
                             Config::kThreads, Config::shared_bytes(stages), device.stream, args, maps, stages);
}

template <typename Element, int kDk, int kDv>
Status launch(const cuda::BackwardArgs& args, const cuda::Launch& device) {
  using ByBoxes = Config<Element, kDk, kDv, false>;
  const RowMaps maps = make_row_maps<ByBoxes>(args);
  if (maps.box_heads > 0) return launch_config<ByBoxes>(args, maps, device);
  return launch_config<Config<Element, kDk, kDv, true>>(args, maps, device);
}

}  // namespace nsa::sm90::selected_dkdv

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, BackwardArgs, sm90::selected_dkdv, launch<ElementOf_##dtype, dk, dv>)
