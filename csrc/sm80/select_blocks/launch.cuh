#pragma once

#include "common/launch.cuh"
#include "sm80/select_blocks/kernel.cuh"

namespace nsa::sm80::select_blocks {

template <typename Config>
Status launch(const cuda::SelectionArgs& args, const cuda::Launch& device) {
  const int list_bytes = args.lists ? 0 : args.tokens_per_group * args.token_bytes;
  // An SM holds two CTAs where their memory lets it: more than half would be stages that gain nothing.
  const int half = device.shared_memory / 2 - 1024;
  const int stages_of_half = Config::num_stages(half, list_bytes);
  const int stages = stages_of_half >= 2 ? stages_of_half : Config::num_stages(device.shared_memory, list_bytes);
  const int ctas = (stages_of_half >= 2 ? 2 : 1) * device.num_sms;
  const int64_t tiles = static_cast<int64_t>(args.plan.max_tiles) * args.num_heads_k;
  const int most = args.lists && ctas > cuda::kMaxSelectionCtas ? cuda::kMaxSelectionCtas : ctas;
  return cuda::launch_kernel("block selection", kernel<Config>, dim3(tiles < most ? static_cast<int>(tiles) : most),
                             Config::kThreads, Config::stages_at(list_bytes) + stages * Config::kStageBytes,
                             device.stream, args, list_bytes, stages);
}

}  // namespace nsa::sm80::select_blocks

// One compiled kernel; lines of instances.cmake become files that use this. Dv takes no part.
#define NSA_INSTANCE(name, dtype, dk, dv)                        \
  namespace nsa::cuda {                                          \
  Status name(const SelectionArgs& args, const Launch& device) { \
    using namespace sm80::select_blocks;                         \
    return launch<Config<ElementOf_##dtype, dk>>(args, device);  \
  }                                                              \
  }
