#pragma once

#include "common/launch.cuh"
#include "sm90/selected_dkdv/kernel.cuh"

namespace nsa::sm90::selected_dkdv {

inline constexpr const char* kWhat = "selected attention dk, dv";

// Heads of a box: the largest power of two that divides G, at most the 16 rows of a warp; 0: that is too few.
template <typename Config>
int box_heads(int group) {
  const int box = (group | 16) & -(group | 16);
  return box < Config::kMinBoxHeads ? 0 : box;
}

// box_heads is 0 too where TMA can't describe the tensors (a stride too long, say).
template <typename Config>
RowMaps make_row_maps(const cuda::BackwardArgs& a) {
  RowMaps maps = {};
  const int box = box_heads<Config>(a.group);
  if (box == 0 || a.plan.total_q == 0) return maps;
  const int heads = a.num_heads_k * a.group;
  if (cuda::make_group_map(kWhat, a.q, a.plan.total_q, heads, Config::kDk, box, box, &maps.q).ok() &&
      cuda::make_group_map(kWhat, a.dout, a.plan.total_q, heads, Config::kDv, box, box, &maps.dout).ok()) {
    maps.box_heads = box;
  }
  return maps;
}

template <typename Config>
KernelTiles tiles_of(const cuda::Launch& device) {
  const int stages = Config::num_stages(device.shared_memory);
  return {Config::kRows, Config::kKeys, stages, Config::kThreads, Config::shared_bytes(stages), Config::kCtas};
}

template <typename Config>
Status launch_config(const cuda::BackwardArgs& args, const RowMaps& maps, const cuda::Launch& device) {
  const KernelTiles tiles = tiles_of<Config>(device);
  const int key_parts = (args.plan.block_size + Config::kKeys - 1) / Config::kKeys;
  return cuda::launch_kernel(kWhat, kernel<Config>, dim3(static_cast<unsigned>(args.index.max_items), key_parts),
                             tiles.threads, tiles.shared_memory, device.stream, args, maps, tiles.stages);
}

template <typename Element, int kDk, int kDv>
KernelTiles tiles(const cuda::Launch& device, int group) {
  using ByBoxes = Config<Element, kDk, kDv, false>;
  return box_heads<ByBoxes>(group) > 0 ? tiles_of<ByBoxes>(device) : tiles_of<Config<Element, kDk, kDv, true>>(device);
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
#define NSA_INSTANCE(name, dtype, dk, dv)                                                         \
  NSA_DEFINE_INSTANCE(name, BackwardArgs, sm90::selected_dkdv, launch<ElementOf_##dtype, dk, dv>) \
  NSA_DEFINE_TILES(name, sm90::selected_dkdv, tiles<ElementOf_##dtype, dk, dv>)
