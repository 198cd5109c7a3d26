#pragma once

#include "common/launch.cuh"
#include "sm90/selected_dkdv/kernel.cuh"

namespace nsa::sm90::selected_dkdv {

// Boxes hold the largest power of two of heads that divides G, at most the 16 rows of a warp. Tensors that TMA can't
// describe (a stride too long, say) are copied by threads, which gives the same sums.
template <typename Config>
RowMaps make_row_maps(const char* what, const cuda::BackwardArgs& a) {
  RowMaps maps = {};
  const int box = (a.group | 16) & -(a.group | 16);
  if (box < Config::kMinBoxHeads || a.plan.total_q == 0) return maps;
  const int heads = a.num_heads_k * a.group;
  if (cuda::make_group_map(what, a.q, a.plan.total_q, heads, Config::kDk, box, box, &maps.q).ok() &&
      cuda::make_group_map(what, a.dout, a.plan.total_q, heads, Config::kDv, box, box, &maps.dout).ok()) {
    maps.box_heads = box;
  }
  return maps;
}

template <typename Config>
Status launch(const cuda::BackwardArgs& args, const cuda::Launch& device) {
  const int stages = Config::num_stages(device.shared_memory);
  const int key_parts = (args.plan.block_size + Config::kKeys - 1) / Config::kKeys;
  constexpr const char* kWhat = "selected attention dk, dv";
  return cuda::launch_kernel(kWhat, kernel<Config>, dim3(static_cast<unsigned>(args.index.max_items), key_parts),
                             Config::kThreads, Config::shared_bytes(stages), device.stream, args,
                             make_row_maps<Config>(kWhat, args), stages);
}

}  // namespace nsa::sm90::selected_dkdv

// One compiled kernel; lines of instances.cmake become files that use this.
#define NSA_INSTANCE(name, dtype, dk, dv)                           \
  namespace nsa::cuda {                                             \
  Status name(const BackwardArgs& args, const Launch& device) {     \
    using namespace sm90::selected_dkdv;                            \
    return launch<Config<ElementOf_##dtype, dk, dv>>(args, device); \
  }                                                                 \
  }
