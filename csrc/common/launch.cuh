// What every kernel's launch needs.
#pragma once

#include <cuda_runtime.h>

#include "common/kernel_args.h"
#include "common/tensor_map.h"
#include "device/ptx.cuh"

namespace nsa::cuda {

// The dtype of an instance's name as a type.
using ElementOf_bfloat16 = __nv_bfloat16;
using ElementOf_float16 = __half;

// The function that launches one compiled kernel, of the folder with this namespace. What follows the namespace is what
// it calls.
#define NSA_DEFINE_INSTANCE(name, Args, folder, ...)    \
  namespace nsa::cuda {                                 \
  Status name(const Args& args, const Launch& device) { \
    using namespace folder;                             \
    return __VA_ARGS__(args, device);                   \
  }                                                     \
  }

// The function that says what it takes at a time, likewise.
#define NSA_DEFINE_TILES(name, folder, ...)                   \
  namespace nsa::cuda {                                       \
  KernelTiles name##_tiles(const Launch& device, int group) { \
    using namespace folder;                                   \
    return __VA_ARGS__(device, group);                        \
  }                                                           \
  }

template <typename Kernel, typename... Args>
Status launch_kernel(const char* what, Kernel* kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                     const Args&... args) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, stream>>>(args...);
    error = cudaGetLastError();
  }
  return cuda_status(error, what);
}

// What a kernel over query tiles (device/query_tile.cuh) takes at a time: with a ring of keys (device/key_ring.cuh)
// `warps` consumers and as many stages as fit, ...
template <typename Config>
KernelTiles key_ring_tiles(const Launch& device, int warps) {
  const int stages = Config::num_stages(device.shared_memory, warps);
  return {16 * warps, Config::kKeys, stages, 32 * (warps + Config::kProducerWarps), Config::shared_bytes(stages, warps),
          1};
}
// ... and with a ring of blocks (device/block_ring.cuh).
template <typename Config>
KernelTiles block_ring_tiles() {
  return {16 * Config::kMaxWarps, Config::kKeys, Config::kKeyStages, Config::kThreads, Config::kUsedBytes, 1};
}

// Launches such a kernel: a CTA per SM, or per tile where those are fewer. more: what it takes between its arguments
// and the number of tiles a head.
template <typename Kernel, typename Args, typename... More>
Status launch_query_tiles(const char* what, Kernel* kernel, const KernelTiles& tiles, const Args& args,
                          const Launch& device, const More&... more) {
  const int warps = tiles.query_rows / 16;
  const Divisor per_head = (args.plan.units.max_units + warps - 1) / warps;
  const int count = per_head * args.num_heads_k;
  return launch_kernel(what, kernel, dim3(count < device.num_sms ? count : device.num_sms), tiles.threads,
                       tiles.shared_memory, device.stream, args, more..., per_head);
}

}  // namespace nsa::cuda
