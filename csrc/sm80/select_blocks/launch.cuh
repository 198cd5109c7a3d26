#pragma once

#include "common/launch.cuh"
#include "sm80/select_blocks/kernel.cuh"

namespace nsa::sm80::select_blocks {

template <typename Config>
Status launch(const cuda::SelectionArgs& args, const cuda::Launch& device) {
  const int list_bytes = args.lists ? 0 : args.tokens_per_group * args.token_bytes;
  int per_sm = Config::kCtas, stages = 0;
  for (; per_sm > 0; --per_sm) {
    stages = Config::num_stages(device.shared_memory / per_sm - (per_sm > 1 ? 1024 : 0), list_bytes);
    if (stages >= 2 || per_sm == 1) break;
  }
  return cuda::launch_kernel(
      "block selection", kernel<Config>, dim3(cuda::selection_ctas(args, per_sm * device.num_sms)), Config::kThreads,
      Config::stages_at(list_bytes) + stages * Config::kStageBytes, device.stream, args, list_bytes, stages);
}

}  // namespace nsa::sm80::select_blocks

// One compiled kernel; lines of instances.cmake become files that use this. Dv takes no part.
#define NSA_INSTANCE(name, dtype, dk, dv) \
  NSA_DEFINE_INSTANCE(name, SelectionArgs, sm80::select_blocks, launch<Config<ElementOf_##dtype, dk>>)
