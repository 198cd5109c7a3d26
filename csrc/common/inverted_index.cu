// The lists turned round by counting: block -> ascending list of q rows, and how the long ones are split.
//
// Rows are cut into spans. A CTA marks which rows of a span chose which blocks of one kv head, as bits in shared
// memory. Their numbers are added up over (list, span), which says where a span's rows begin in every list; a row
// stands behind those of the span's rows before it. Nothing depends on the order in which entries are met. The lists
// are read twice and what is kept is written once: a radix sort of pairs, before and after which they were made and
// taken apart, took two to three times as long and 12 bytes an entry.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "common/integers.h"
#include "common/plan.h"

namespace nsa::cuda {
namespace {

constexpr int kThreads = 512;
// Rows of a span. (list, span) pairs grow with blocks times rows, so that many blocks make longer spans: about as many
// pairs as entries, up to kMaxSpan * S blocks.
constexpr int kMinSpan = 128, kMaxSpan = 8192;
// For a cell: two of them fit an SM of 228 KB, and every GPU that these kernels run on has 99 KB for a CTA. The lists
// of a million tokens are read 24 times then (2.3 ms of 134), with 46 KB 49 times (3.3 ms).
constexpr int kSharedBytes = 96 * 1024;
// A span's entries go to the lists through shared memory where they are at most so many, and at least so many a block.
constexpr int kMaxStaged = 4096, kMinStaged = 2;

// Enough items to fill 132 SMs many times over, and not more, since every split list costs its partial tiles. Where dS
// is kept half as many: 2048 took 0.4 ms more at 64K tokens in windows of 8192.
constexpr int64_t kWantedItems = 2048, kWantedWithDs = 1024;
constexpr int64_t kMinChunk = 128;

// Items are worked off by their middle row, so that those side by side read about the same rows, where a kv head's Q
// and dO of a window are more than the L2 holds and lists are short: dK and dV of 64K clustered tokens (128 entries a
// list and window) take 11.5 ms instead of 12.2. Of 16K (512 entries) each list goes through the whole window, and an
// order does nothing.
constexpr int64_t kOrderedBytes = int64_t{32} << 20;
constexpr int64_t kOrderedEntries = 256;

struct Scratch {
  uint64_t *keys_in, *keys_out;  // [windows, max_items], null: items aren't ordered
  WorkItem* items;               // likewise
  void* cub;
  std::size_t cub_bytes;
};

int64_t num_pairs(const InvertedIndex& index) { return static_cast<int64_t>(index.num_lists) * index.spans; }

Scratch carve_scratch(const InvertedIndex& index, Carver& carver) {
  Scratch s = {};
  std::size_t pairs_bytes = 0, order_bytes = 0;
  int64_t* const pairs = nullptr;
  cub::DeviceScan::ExclusiveSum(nullptr, pairs_bytes, pairs, pairs, num_pairs(index) + 1);
  if (index.ordered) {
    const int64_t items = index.windows.count * index.max_items;
    s.keys_in = carver.take<uint64_t>(items);
    s.keys_out = carver.take<uint64_t>(items);
    s.items = carver.take<WorkItem>(items);
    cub::DeviceRadixSort::SortPairs(nullptr, order_bytes, s.keys_in, s.keys_out, s.items, s.items, items);
  }
  s.cub_bytes = std::max(pairs_bytes, order_bytes);
  s.cub = carver.take<char>(s.cub_bytes);
  return s;
}

// How the CTAs of a pass over the lists share the work: each takes a span, a kv head and a range of blocks.
struct Cells {
  Divisor ranges, num_heads, spans, list_width;
  int blocks;  // of a range
  int count;
  int staged;  // entries of a span, where its rows go to the lists through shared memory; else 0. Then one range is all

  Cells(const Plan& plan, const InvertedIndex& index, int num_heads_k)
      : num_heads(num_heads_k), spans(index.spans), list_width(plan.list_width) {
    const int64_t entries = static_cast<int64_t>(index.span_rows) * plan.list_width, all = std::max(plan.num_blocks, 1);
    staged = entries <= kMaxStaged && entries >= kMinStaged * all ? static_cast<int>(entries) : 0;
    const int64_t most = (kSharedBytes - 4 * staged) / bytes_of_block(index.span_rows);
    ranges = static_cast<int>(divide_up(all, most));
    blocks = static_cast<int>(divide_up(all, ranges));
    count = ranges * num_heads * spans * index.windows.count;
  }
  // Its bits, and where it begins in the index and in the cell.
  static int bytes_of_block(int span_rows) { return span_rows / 8 + 12; }
  int shared_bytes(const InvertedIndex& index) const { return blocks * bytes_of_block(index.span_rows) + 4 * staged; }
};

// A CTA's cell: which of the rows chose which of the blocks. Every thread calls the constructor. kWide: entries that a
// thread reads at a time, of one row; divides S.
template <int kWide>
class Cell {
 public:
  int head, window;
  int first_row, rows;
  int first_block, blocks;

  __device__ __forceinline__ Cell(const Plan& plan, const InvertedIndex& index, const Cells& cells, unsigned* bits)
      : bits_(bits), stride_(cells.blocks), words_(index.span_rows / 32) {
    int number = blockIdx.x;
    first_block = number % cells.ranges * cells.blocks;
    blocks = min(cells.blocks, plan.num_blocks - first_block);
    number = number / cells.ranges;
    head = number % cells.num_heads;
    number = number / cells.num_heads;
    span_ = number % cells.spans;
    window = number / cells.spans;
    const int before = span_ * index.span_rows;  // rows of the window
    first_row = window * index.windows.rows + before;
    rows = max(min(min(index.span_rows, index.windows.rows - before), plan.total_q - first_row), 0);
    for (int i = threadIdx.x; i < words_ * stride_; i += kThreads) bits_[i] = 0;
    __syncthreads();
    for_entries(plan, cells, [&](int, int row, const int (&listed)[kWide]) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        if (const int block = local(listed[j]); block >= 0)
          atomicOr(bits_ + row / 32 * stride_ + block, 1u << row % 32);
      }
    });
    __syncthreads();
  }
  // function(i, row, listed): entries i .. i + kWide of the cell, but for those that have none of its blocks. Lists
  // ascend: of a million tokens, whose blocks take dozens of cells, most are passed over with two comparisons.
  template <typename Function>
  __device__ __forceinline__ void for_entries(const Plan& plan, const Cells& cells, Function function) const {
    const int32_t* const lists = plan.lists + entry(plan, 0);
    const int last_block = first_block == 0 ? kNoBlock : first_block + blocks - 1;  // the first has the absent ones
#pragma unroll 2
    for (int i = kWide * threadIdx.x; i < rows * plan.list_width; i += kWide * kThreads) {
      int listed[kWide];
      if constexpr (kWide == 4) {
        const int4 four = __ldg(reinterpret_cast<const int4*>(lists + i));
        listed[0] = four.x;
        listed[1] = four.y;
        listed[2] = four.z;
        listed[3] = four.w;
      } else {
        listed[0] = __ldg(lists + i);
      }
      if (listed[0] <= last_block && listed[kWide - 1] >= first_block) function(i, i / cells.list_width, listed);
    }
  }
  // Of the first row's i-th entry on: [Hkv, total_q, S].
  __device__ __forceinline__ int64_t entry(const Plan& plan, int i) const {
    return (static_cast<int64_t>(head) * plan.total_q + first_row) * plan.list_width + i;
  }
  // A block's number in the cell, -1: it isn't in it.
  __device__ __forceinline__ int local(int block) const {
    return block >= first_block && block - first_block < blocks ? block - first_block : -1;
  }
  // Rows of the cell that chose the block, before `row` of them.
  __device__ __forceinline__ int chosen(int block, int row) const {
    int sum = 0;
    for (int w = 0; w < row / 32; ++w) sum += __popc(bits_[w * stride_ + block]);
    return row % 32 ? sum + __popc(bits_[row / 32 * stride_ + block] & ((1u << row % 32) - 1)) : sum;
  }
  // Of the block's list, this span.
  __device__ __forceinline__ int64_t pair(const Plan& plan, const InvertedIndex& index, int block) const {
    const int list = window * index.window_lists + head * plan.num_blocks + first_block + block;
    return static_cast<int64_t>(list) * index.spans + span_;
  }

 private:
  unsigned* bits_;  // [words, blocks]
  int stride_, words_, span_;
};

template <int kWide>
__global__ void __launch_bounds__(kThreads)
    count_rows(Plan plan, InvertedIndex index, const __grid_constant__ Cells cells, int64_t* counts) {
  extern __shared__ __align__(16) char shared[];
  const Cell<kWide> cell(plan, index, cells, reinterpret_cast<unsigned*>(shared));
  for (int b = threadIdx.x; b < cell.blocks; b += kThreads)
    counts[cell.pair(plan, index, b)] = cell.chosen(b, index.span_rows);
  if (blockIdx.x == 0 && threadIdx.x == 0) counts[static_cast<int64_t>(index.num_lists) * index.spans] = 0;
}

// Those of kWide places that bits of `mine` name.
template <int kWide>
__device__ __forceinline__ void write_places(uint32_t* to, const uint32_t (&place)[kWide], unsigned mine) {
  if constexpr (kWide == 4) {
    if (mine == 0xf) {
      *reinterpret_cast<uint4*>(to) = {place[0], place[1], place[2], place[3]};
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    if (mine >> j & 1) to[j] = place[j];
  }
}

// Where a cell has several rows of a block, rows are put in order in shared memory before they are written: one after
// the other each would be a write of its own for the L2 (32K tokens, 16 kv heads: 134 us, in order 74).
template <int kWide>
__global__ void __launch_bounds__(kThreads)
    place_rows(Plan plan, InvertedIndex index, const __grid_constant__ Cells cells, int32_t* rows, uint32_t* places) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  extern __shared__ __align__(16) char shared[];
  auto* const begins = reinterpret_cast<int64_t*>(shared);
  auto* const starts = reinterpret_cast<int*>(begins + cells.blocks);
  auto* const staged = reinterpret_cast<unsigned*>(starts + cells.blocks);
  const Cell<kWide> cell(plan, index, cells, staged + cells.staged);
  int count = 0;
  for (int first = 0; first < cell.blocks; first += kThreads) {
    const int b = first + threadIdx.x;
    const bool real = b < cell.blocks;
    int before = 0, sum = 0;
    if (cells.staged) {
      Scan(storage).ExclusiveSum(real ? cell.chosen(b, index.span_rows) : 0, before, sum);
      __syncthreads();
    }
    if (real) {
      starts[b] = count + before;
      begins[b] = index.begins[cell.pair(plan, index, b)] - (count + before);
    }
    count += sum;
  }
  __syncthreads();
  index.window = cell.window;
  const int64_t to_place = index.first_place() - index.list_begin(index.first_list());
  const int64_t first_entry = cell.entry(plan, 0);
  cell.for_entries(plan, cells, [&](int i, int row, const int (&listed)[kWide]) {
    uint32_t place[kWide];
    unsigned mine = 0;
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const int block = cell.local(listed[j]);
      place[j] = InvertedIndex::kNoPlace;
      if (block >= 0) {
        const int nth = starts[block] + cell.chosen(block, row);
        const int64_t to = begins[block] + nth;
        if (cells.staged)
          staged[nth] = block * kMaxSpan + row;
        else
          rows[to] = cell.first_row + row;
        const bool halves = plan.block_size > 64 && plan.blocks[listed[j]].y > 64;
        place[j] = static_cast<uint32_t>(to + to_place) | (halves ? InvertedIndex::kTwoHalves : 0);
      }
      if (block >= 0 || (listed[j] == kNoBlock && cell.first_block == 0)) mine |= 1u << j;
    }
    if (places) write_places<kWide>(places + first_entry + i, place, mine);
  });
  if (!cells.staged) return;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads)
    rows[begins[staged[i] / kMaxSpan] + i] = cell.first_row + staged[i] % kMaxSpan;
}

// The same in every call, whatever it needs: another thread's call may come between this and the launch.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

// A thread a list. With b entries of the window before it, the n-th list's items begin at slot n + b / chunk: as many
// as its entries can need are left before the next one's, so that nobody has to add up what others have. The same holds
// for partial tiles at 2 b / chunk, of a list with two or more. Slots between are left empty.
//
// An empty list is an item too where there is one window: its gradients are zeros that somebody must write.
//
// keys: (window and kv head, q row in the item's middle), empty slots last in their window; null: not wanted.
__global__ void make_items(Plan plan, InvertedIndex index, WorkItem* items, uint64_t* keys) {
  const int list = blockIdx.x * blockDim.x + threadIdx.x;
  if (list >= index.num_lists) return;
  index.window = list / index.window_lists;
  const int nth = list - index.first_list(), head = nth / plan.num_blocks;
  const int2 block = plan.blocks[nth - head * plan.num_blocks];
  const int64_t before = index.list_begin(index.first_list()), begin = index.list_begin(list);
  const int entries = static_cast<int>(index.list_begin(list + 1) - begin);
  const int pieces = entries > 0 ? (entries - 1) / index.chunk + 1 : index.windows.count == 1;
  const int partial = static_cast<int>(2 * (begin - before) / index.chunk);
  const int64_t first = index.window * index.max_items + nth + (begin - before) / index.chunk;
  const int64_t end = nth + 1 < index.window_lists
                          ? index.window * index.max_items + nth + 1 + (begin - before + entries) / index.chunk
                          : (index.window + 1) * index.max_items;
  const auto group = static_cast<uint64_t>(list / plan.num_blocks);
  const auto last_group = static_cast<uint64_t>((index.first_list() + index.window_lists) / plan.num_blocks - 1);
  for (int64_t i = first; i < end; ++i) {
    WorkItem item = {};
    uint64_t key = last_group << 32 | ~0u;
    const int64_t piece = i - first, from = begin + piece * index.chunk;
    if (piece < pieces) {
      const int count = static_cast<int>(min(begin + entries - from, static_cast<int64_t>(index.chunk)));
      item = {head,
              block.x,
              block.y,
              count,
              from,
              pieces > 1 ? partial + static_cast<int>(piece) : -1,
              piece == 0 ? pieces : 0};
      if (keys && count > 0) key = group << 32 | static_cast<uint32_t>(index.rows[from + count / 2]);
    }
    items[i] = item;
    if (keys) keys[i] = key;
  }
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
  const int64_t chunk = divide_up(window_entries / wanted, kMinChunk) * kMinChunk;
  index.chunk = static_cast<int>(std::max(chunk, kMinChunk));
  index.max_items = index.window_lists + window_entries / index.chunk;
  index.max_partials = 2 * window_entries / index.chunk;
  index.span_rows = static_cast<int>(std::clamp<int64_t>(
      std::bit_ceil(static_cast<uint64_t>(plan.num_blocks / std::max(plan.list_width, 1))), kMinSpan, kMaxSpan));
  index.spans = static_cast<int>(divide_up(windows.rows, index.span_rows));
  index.rows = carver.take<int32_t>(entries);
  index.begins = carver.take<int64_t>(num_pairs(index) + 1);
  const int64_t row_bytes = 2 * p.num_heads_q / p.num_heads_k * (p.head_dim_qk + p.head_dim_v);  // of Q and dO
  index.ordered = index.num_lists > 0 && wants_places && windows.rows * row_bytes > kOrderedBytes &&
                  window_entries <= kOrderedEntries * index.window_lists;
  index.items = carver.take<WorkItem>(windows.count * index.max_items);
  index.places = wants_places ? carver.take<uint32_t>(entries) : nullptr;
  // the scratch carves the same pieces in the same order again when it is used
  char* const begin = carver.take<char>(0);
  Carver inside(begin);
  carve_scratch(index, inside);
  carver.take<char>(static_cast<int64_t>(inside.used()));
  *scratch = begin;
  return index;
}

Status make_index(const Plan& plan, const InvertedIndex& index, int num_heads_k, void* scratch, cudaStream_t stream) {
  Carver inside(scratch);
  Scratch s = carve_scratch(index, inside);
  const Cells cells(plan, index, num_heads_k);
  auto* const begins = const_cast<int64_t*>(index.begins);
  const bool wide = plan.list_width % 4 == 0;
  const auto count = wide ? count_rows<4> : count_rows<1>;
  const auto place = wide ? place_rows<4> : place_rows<1>;
  const int shared = cells.shared_bytes(index);
  cudaError_t error = allow_shared(count);
  if (error == cudaSuccess) error = allow_shared(place);
  if (error != cudaSuccess) return cuda_status(error, "selected attention backward: the inverted index' shared memory");
  count<<<cells.count, kThreads, shared, stream>>>(plan, index, cells, begins);
  error = cub::DeviceScan::ExclusiveSum(s.cub, s.cub_bytes, begins, begins, num_pairs(index) + 1, stream);
  if (error != cudaSuccess) return cuda_status(error, "selected attention backward: counting rows of blocks");
  place<<<cells.count, kThreads, shared, stream>>>(plan, index, cells, const_cast<int32_t*>(index.rows),
                                                   const_cast<uint32_t*>(index.places));
  auto* const items = const_cast<WorkItem*>(index.items);
  if (index.num_lists > 0) {
    make_items<<<(index.num_lists + 255) / 256, 256, 0, stream>>>(plan, index, index.ordered ? s.items : items,
                                                                  s.keys_in);
  }
  if (index.ordered) {
    error = cub::DeviceRadixSort::SortPairs(
        s.cub, s.cub_bytes, s.keys_in, s.keys_out, s.items, items, index.windows.count * index.max_items, 0,
        32 + std::bit_width(static_cast<unsigned>(index.num_lists / plan.num_blocks)), stream);
    if (error != cudaSuccess) return cuda_status(error, "selected attention backward: ordering the inverted index");
  }
  return cuda_status(cudaGetLastError(), "selected attention backward: building the inverted index");
}

}  // namespace nsa::cuda
