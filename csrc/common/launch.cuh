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

// CTAs of a kernel over query tiles (device/query_tile.cuh): one an SM, or one a tile where those are fewer.
template <typename Args>
dim3 tile_grid(const Args& args, int tiles_per_head, const Launch& device) {
  const int tiles = tiles_per_head * args.num_heads_k;
  return dim3(tiles < device.num_sms ? tiles : device.num_sms);
}

// Such a kernel with a ring of keys (device/key_ring.cuh): `warps` consumers and as many stages as fit.
template <typename Config>
KernelTiles key_ring_tiles(const Launch& device, int warps) {
  const int stages = Config::num_stages(device.shared_memory, warps);
  return {16 * warps, Config::kKeys, stages, 32 * (warps + Config::kProducerWarps), Config::shared_bytes(stages, warps),
          1};
}
template <typename Kernel, typename Args>
Status launch_key_ring(const char* what, Kernel* kernel, const KernelTiles& tiles, const Args& args,
                       const Launch& device) {
  const int warps = tiles.query_rows / 16;
  const Divisor per_head = (args.plan.units.max_units + warps - 1) / warps;
  return launch_kernel(what, kernel, tile_grid(args, per_head, device), tiles.threads, tiles.shared_memory,
                       device.stream, args, tiles.stages, warps, per_head);
}

// The same with a ring of blocks (device/block_ring.cuh). maps: what it loads by TMA.
template <typename Config>
KernelTiles block_ring_tiles() {
  return {16 * Config::kMaxWarps, Config::kKeys, Config::kKeyStages, Config::kThreads, Config::kUsedBytes, 1};
}
template <typename Config, typename Kernel, typename Args, typename Maps>
Status launch_block_ring(const char* what, Kernel* kernel, const Args& args, const Launch& device, const Maps& maps) {
  const Divisor per_head = (args.plan.units.max_units + Config::kMaxWarps - 1) / Config::kMaxWarps;
  return launch_kernel(what, kernel, tile_grid(args, per_head, device), Config::kThreads, Config::kUsedBytes,
                       device.stream, args, maps, per_head);
}

}  // namespace nsa::cuda
