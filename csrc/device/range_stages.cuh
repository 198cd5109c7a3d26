// The stages of keys of the portable kernels over tiles of query rows (forward and dQ of range attention): all threads
// of a CTA copy them, a stage ahead.
#pragma once

#include "device/range_tile.cuh"

namespace nsa::device {

// attend(stage, key): the stage in shared memory and the k row of its first key. load_rows: before anything is waited
// for; what it copies by cp.async is there when attend runs.
template <typename Config, typename Queries, typename LoadRows, typename Attend>
__device__ __forceinline__ void for_key_stages(const cuda::TensorArg& k, const cuda::TensorArg& v, const Queries& tile,
                                               uint32_t shared, LoadRows load_rows, Attend attend) {
  const RowCopy<Tile<Config::kDk>, Config::kThreads> copy_k(k.row_bytes, threadIdx.x);
  const RowCopy<Tile<Config::kDv>, Config::kThreads> copy_v(v.row_bytes, threadIdx.x);
  const int stages = tile.num_stages(Config::kKeys);
  const auto load = [&](int i) {
    if (i < stages) {
      const int key = tile.first + i * Config::kKeys, valid = min(tile.end - key, Config::kKeys);
      const uint32_t at = shared + i % Config::kStages * Config::kStageBytes;
      copy_k.some(at, k.at(key, tile.head), k.row_bytes, Config::kKeys, valid);
      copy_v.some(at + Config::kKeyBytes, v.at(key, tile.head), v.row_bytes, Config::kKeys, valid);
    }
    commit_copies();
  };
  load_rows();
#pragma unroll
  for (int i = 0; i < Config::kStages - 1; ++i) load(i);
  for (int i = 0; i < stages; ++i) {
    wait_copies_but<Config::kStages - 2>();
    __syncthreads();  // the stage has landed, and everybody is done with the one before it
    load(i + Config::kStages - 1);
    attend(shared + i % Config::kStages * Config::kStageBytes, tile.first + i * Config::kKeys);
  }
}

}  // namespace nsa::device
