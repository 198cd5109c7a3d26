// The lists turned round with a stable radix sort: block -> ascending list of q rows, and how the long ones are split.
#include <cuda_runtime.h>

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "common/plan.h"

namespace nsa::cuda {
namespace {

// Enough items to fill 132 SMs many times over, and not more, since every split list costs its partial tiles. Where dS
// is kept half as many: 2048 took 0.4 ms more at 64K tokens in windows of 8192.
constexpr int64_t kWantedItems = 2048, kWantedWithDs = 1024;
constexpr int kMinChunk = 128;

// Lists are worked off by their middle row, so that items side by side read about the same rows, where a kv head's Q
// and dO of a window are more than the L2 holds and lists are short: dK and dV of 64K clustered tokens (128 entries a
// list and window) take 11.5 ms instead of 12.2. Of 16K (512 entries) each list goes through the whole window, and an
// order does nothing.
constexpr int64_t kOrderedBytes = int64_t{32} << 20;
constexpr int64_t kOrderedEntries = 256;

// The values that are sorted: entry = q row * S + place in the row's list.
struct Scratch {
  uint32_t* keys_in;
  uint32_t* keys_out;
  uint32_t* values_in;
  uint64_t* work_count;            // [num_lists + 1]
  uint64_t *order_in, *order_out;  // [num_lists], null: not wanted
  int32_t* lists_in;               // [num_lists]
  void* cub;
  std::size_t cub_bytes;
  int64_t entries;
  int key_bits;
};

int bits_of(uint32_t value) {
  int bits = 1;
  while (bits < 32 && value >> bits) ++bits;
  return bits;
}

Scratch carve_scratch(int num_lists, int64_t entries, bool ordered, Carver& carver) {
  Scratch s = {};
  s.entries = entries;
  s.key_bits = bits_of(static_cast<uint32_t>(num_lists));
  s.keys_in = carver.take<uint32_t>(entries);
  s.keys_out = carver.take<uint32_t>(entries);
  s.values_in = carver.take<uint32_t>(entries);
  s.work_count = carver.take<uint64_t>(num_lists + 1);
  std::size_t sort_bytes = 0, scan_bytes = 0;
  cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, s.keys_in, s.keys_out, s.values_in, s.values_in, entries, 0,
                                  s.key_bits);
  cub::DeviceScan::ExclusiveSum(nullptr, scan_bytes, s.work_count, s.work_count, num_lists + 1);
  s.cub_bytes = std::max(sort_bytes, scan_bytes);
  if (ordered) {
    s.order_in = carver.take<uint64_t>(num_lists);
    s.order_out = carver.take<uint64_t>(num_lists);
    s.lists_in = carver.take<int32_t>(num_lists);
    std::size_t order_bytes = 0;
    cub::DeviceRadixSort::SortPairs(nullptr, order_bytes, s.order_in, s.order_out, s.lists_in, s.lists_in, num_lists);
    s.cub_bytes = std::max(s.cub_bytes, order_bytes);
  }
  s.cub = carver.take<char>(s.cub_bytes);
  return s;
}

// Entry i of [Hkv, total_q, S] -> (list, entry); kNoBlock sorts behind every list.
__global__ void make_pairs(Plan plan, InvertedIndex index, int64_t entries, uint32_t* keys, uint32_t* values) {
  const int64_t per_head = static_cast<int64_t>(plan.total_q) * plan.list_width;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < entries;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int head = static_cast<int>(i / per_head);
    const auto entry = static_cast<uint32_t>(i - head * per_head);
    const int window = static_cast<int>(entry / plan.list_width) / index.windows.rows;
    const int block = plan.lists[i];
    keys[i] = block == kNoBlock ? index.num_lists
                                : static_cast<uint32_t>(window) * index.window_lists + head * plan.num_blocks + block;
    values[i] = entry;
  }
}

__global__ void find_lists(const uint32_t* keys, int64_t entries, int num_lists, int64_t* list_begin) {
  const int list = blockIdx.x * blockDim.x + threadIdx.x;
  if (list > num_lists) return;
  int64_t low = 0, high = entries;  // first key >= list
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < static_cast<uint32_t>(list))
      low = middle + 1;
    else
      high = middle;
  }
  list_begin[list] = low;
}

// The sorted values become q rows, and places tell where each entry went.
__global__ void place_entries(Plan plan, InvertedIndex index, int64_t entries, const uint32_t* keys, uint32_t* values,
                              uint32_t* places) {
  const int64_t per_head = static_cast<int64_t>(plan.total_q) * plan.list_width;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < entries;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const uint32_t entry = values[i];
    values[i] = entry / plan.list_width;
    if (!places || keys[i] >= static_cast<uint32_t>(index.num_lists)) continue;
    index.window = static_cast<int>(keys[i]) / index.window_lists;
    const int list = static_cast<int>(keys[i]) - index.first_list(), head = list / plan.num_blocks;
    const bool halves = plan.blocks[list - head * plan.num_blocks].y > 64;
    places[head * per_head + entry] =
        static_cast<uint32_t>(i - index.list_begin[index.first_list()] + index.first_place()) |
        (halves ? InvertedIndex::kTwoHalves : 0);
  }
}

// (window and kv head, q row in the list's middle); empty lists last.
__global__ void make_order_keys(InvertedIndex index, int num_blocks, uint64_t* keys, int32_t* lists) {
  const int list = blockIdx.x * blockDim.x + threadIdx.x;
  if (list >= index.num_lists) return;
  const int64_t begin = index.list_begin[list], end = index.list_begin[list + 1];
  const uint32_t row = begin < end ? static_cast<uint32_t>(index.rows[(begin + end) / 2]) : ~0u;
  keys[list] = static_cast<uint64_t>(list / num_blocks) << 32 | row;
  lists[list] = list;
}

// An empty list is one item too where there is one window: its gradients are zeros that somebody must write.
__global__ void count_work(InvertedIndex index, int items_of_none, uint64_t* count) {
  const int place = blockIdx.x * blockDim.x + threadIdx.x;
  if (place > index.num_lists) return;
  uint64_t items = 0;
  if (place < index.num_lists) {
    const int list = index.nth_list(place);
    items = (index.list_begin[list + 1] - index.list_begin[list] + index.chunk - 1) / index.chunk;
  }
  const uint64_t partials = items > 1 ? items : 0;
  count[place] = place < index.num_lists ? (items ? items : items_of_none) | partials << 32 : 0;
}

}  // namespace

InvertedIndex carve_index(const SelectedAttentionProblem& p, const Plan& plan, const Windows& windows,
                          bool wants_places, Carver& carver, void** scratch) {
  InvertedIndex index = {};
  const int64_t entries_per_row = p.num_heads_k * plan.list_width;
  const int64_t entries = plan.total_q * entries_per_row, window_entries = windows.rows * entries_per_row;
  index.windows = windows;
  index.window_lists = static_cast<int>(p.num_heads_k * plan.num_blocks);
  index.num_lists = windows.count * index.window_lists;
  index.buffer_entries = windows.buffers > 1 ? window_entries : 0;
  const int64_t wanted = wants_places ? kWantedWithDs : kWantedItems;
  const int64_t chunk = (window_entries / wanted + kMinChunk - 1) / kMinChunk * kMinChunk;
  index.chunk = static_cast<int>(chunk < kMinChunk ? kMinChunk : chunk);
  index.max_items = index.window_lists + window_entries / index.chunk;
  index.max_partials = 2 * (window_entries / index.chunk);
  index.rows = carver.take<int32_t>(entries);
  index.list_begin = carver.take<int64_t>(index.num_lists + 1);
  const int64_t row_bytes = 2 * p.num_heads_q / p.num_heads_k * (p.head_dim_qk + p.head_dim_v);  // of Q and dO
  const bool ordered = wants_places && windows.rows * row_bytes > kOrderedBytes &&
                       window_entries <= kOrderedEntries * index.window_lists;
  index.order = ordered ? carver.take<int32_t>(index.num_lists) : nullptr;
  index.work_begin = carver.take<uint64_t>(index.num_lists + 1);
  index.places = wants_places ? carver.take<uint32_t>(entries) : nullptr;
  // the scratch carves the same pieces in the same order again when it is used
  char* const begin = carver.take<char>(0);
  Carver inside(begin);
  carve_scratch(index.num_lists, entries, ordered, inside);
  carver.take<char>(static_cast<int64_t>(inside.used()));
  *scratch = begin;
  return index;
}

Status make_index(const Plan& plan, const InvertedIndex& index, int num_heads_k, void* scratch, cudaStream_t stream) {
  const int64_t entries = static_cast<int64_t>(plan.total_q) * num_heads_k * plan.list_width;
  Carver inside(scratch);
  Scratch s = carve_scratch(index.num_lists, entries, index.order != nullptr, inside);
  int64_t* list_begin = const_cast<int64_t*>(index.list_begin);
  auto* values = reinterpret_cast<uint32_t*>(const_cast<int32_t*>(index.rows));  // until they become rows
  const int grid = grid_size(entries, 256);
  cudaError_t error = cudaSuccess;
  if (entries > 0) {
    make_pairs<<<grid, 256, 0, stream>>>(plan, index, entries, s.keys_in, s.values_in);
    error = cub::DeviceRadixSort::SortPairs(s.cub, s.cub_bytes, s.keys_in, s.keys_out, s.values_in, values, entries, 0,
                                            s.key_bits, stream);
    if (error != cudaSuccess) return cuda_status(error, "selected attention backward: sorting the inverted index");
  }
  const int threads = index.num_lists + 1;
  find_lists<<<(threads + 255) / 256, 256, 0, stream>>>(s.keys_out, entries, index.num_lists, list_begin);
  if (entries > 0) {
    if (index.places) {
      error = cudaMemsetAsync(const_cast<uint32_t*>(index.places), 0xff, entries * sizeof(uint32_t), stream);
      if (error != cudaSuccess) return cuda_status(error, "selected attention backward: clearing places");
    }
    place_entries<<<grid, 256, 0, stream>>>(plan, index, entries, s.keys_out, values,
                                            const_cast<uint32_t*>(index.places));
  }
  if (index.order && index.num_lists > 0) {
    make_order_keys<<<(threads + 255) / 256, 256, 0, stream>>>(index, plan.num_blocks, s.order_in, s.lists_in);
    error = cub::DeviceRadixSort::SortPairs(s.cub, s.cub_bytes, s.order_in, s.order_out, s.lists_in,
                                            const_cast<int32_t*>(index.order), index.num_lists, 0,
                                            32 + bits_of(index.num_lists / plan.num_blocks), stream);
    if (error != cudaSuccess) return cuda_status(error, "selected attention backward: ordering the inverted index");
  }
  count_work<<<(threads + 255) / 256, 256, 0, stream>>>(index, index.windows.count == 1, s.work_count);
  error = cub::DeviceScan::ExclusiveSum(s.cub, s.cub_bytes, s.work_count, const_cast<uint64_t*>(index.work_begin),
                                        threads, stream);
  if (error == cudaSuccess) error = cudaGetLastError();
  return cuda_status(error, "selected attention backward: building the inverted index");
}

}  // namespace nsa::cuda
