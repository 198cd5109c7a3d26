// Fills a Plan: repaired sequences, the table of blocks, and the callers' lists made ascending and unique.
#include "common/plan.h"

#include <cuda_runtime.h>

#include "common/integers.h"
#include "common/sequences.cuh"
#include "device/warp_scan.cuh"

namespace nsa::cuda {
namespace {

using device::kFullWarp;

constexpr int kListWarps = 4;
constexpr int kWindowWords = 1024;  // 32768 blocks a pass, 4 KiB of shared memory a warp

struct Sequences {
  const int32_t* cu_q;  // [B + 1] as the caller gave them, or null
  const int32_t* cu_k;
  int32_t* q_begin;      // [B + 1] repaired
  int32_t* key_begin;    // [B + 1]
  int32_t* block_begin;  // [B + 1]
  int32_t* token_begin;  // [B + 3] Units
  int32_t* unit_begin;   // [B + 3]
  int batch;
};

struct ListArgs {
  Sequences sequences;
  const void* indices;
  const int32_t* counts;
  const int32_t* q_offsets;
  int64_t index_batch, index_row, index_head, index_entry;
  int64_t count_batch, count_row, count_head;
  int64_t count;     // for every row, where counts is null
  int64_t q_offset;  // where has_q_offset and q_offsets is null
  bool index_is_int64, has_q_offset, causal;
  bool in_fours;  // four entries, of a list's from a multiple of four on, lie side by side on 16 (32) bytes
  int batch, seqlen_q, seqlen_k;
  Divisor num_heads;
  int32_t* lists;
  int32_t* last_key;
};

// Repaired sequences, the blocks before each, and units of query rows. One CTA.
__global__ void __launch_bounds__(kSequenceThreads)
    repair_sequences(Sequences s, int total_q, int total_k, int block_size, int group, int unit_alignment) {
  __shared__ SequenceScan::Scan::TempStorage storage;
  SequenceScan scan(storage);
  scan.repair(s.cu_q, s.q_begin, s.batch, total_q);
  scan.repair(s.cu_k, s.key_begin, s.batch, total_k);
  scan.sum_before(s.batch, s.block_begin,
                  [&](int b) { return (s.key_begin[b + 1] - s.key_begin[b] + block_size - 1) / block_size; });
  scan.lay_units(s.q_begin, s.batch, total_q, group, unit_alignment, s.token_begin, s.unit_begin);
}

__global__ void make_blocks(Sequences s, int num_blocks, int block_size, int seqlen_k, int2* blocks) {
  const int block = blockIdx.x * blockDim.x + threadIdx.x;
  if (block >= num_blocks) return;
  int first, end;
  if (s.cu_k) {
    const int b = find_sequence(s.block_begin, s.batch, block);
    if (b >= s.batch) {
      blocks[block] = {0, 0};
      return;
    }
    first = s.key_begin[b] + (block - s.block_begin[b]) * block_size;
    end = s.key_begin[b + 1];
  } else {
    const int per_sequence = (seqlen_k + block_size - 1) / block_size;
    const int b = block / per_sequence;
    first = b * seqlen_k + (block - b * per_sequence) * block_size;
    end = (b + 1) * seqlen_k;
  }
  blocks[block] = {first, min(block_size, end - first)};
}

// One row's place: which blocks its entries may name and how far it may see.
struct RowPlace {
  int64_t index_offset, count_offset;
  int first_block;  // number of the sequence's block 0
  int num_visible;  // blocks that exist and (causal) don't start after p
  int last_key;     // k row; -1 outside every sequence
};

__device__ RowPlace place_row(const ListArgs& a, int row, int block_size) {
  RowPlace place;
  int b, t, length_q, length_k, key0;
  if (a.sequences.cu_q) {
    const Sequences& s = a.sequences;
    b = find_sequence(s.q_begin, s.batch, row);
    place.index_offset = row * a.index_row;
    place.count_offset = row * a.count_row;
    if (b < 0 || b >= s.batch) {
      place.first_block = place.num_visible = 0;
      place.last_key = -1;
      return place;
    }
    t = row - s.q_begin[b];
    length_q = s.q_begin[b + 1] - s.q_begin[b];
    key0 = s.key_begin[b];
    length_k = s.key_begin[b + 1] - key0;
    place.first_block = s.block_begin[b];
  } else {
    b = row / a.seqlen_q;
    t = row - b * a.seqlen_q;
    length_q = a.seqlen_q;
    length_k = a.seqlen_k;
    key0 = b * length_k;
    place.first_block = b * ((length_k + block_size - 1) / block_size);
    place.index_offset = b * a.index_batch + t * a.index_row;
    place.count_offset = b * a.count_batch + t * a.count_row;
  }
  int64_t offset = length_k - length_q;
  if (a.q_offsets)
    offset = a.q_offsets[b];
  else if (a.has_q_offset)
    offset = a.q_offset;
  int64_t visible = length_k;  // keys
  if (a.causal) visible = min(visible, max(t + offset + 1, int64_t{0}));
  place.num_visible = static_cast<int>((visible + block_size - 1) / block_size);
  place.last_key = key0 + static_cast<int>(visible) - 1;
  return place;
}

__device__ int valid_id(int64_t id, int num_visible) {
  return id >= 0 && id < num_visible ? static_cast<int>(id) : kNoBlock;
}

__device__ int entry(const ListArgs& a, int64_t offset, int num_visible) {
  return valid_id(a.index_is_int64 ? static_cast<const int64_t*>(a.indices)[offset]
                                   : static_cast<const int32_t*>(a.indices)[offset],
                  num_visible);
}

__device__ int num_entries(const ListArgs& a, const RowPlace& place, int head, int list_width) {
  const int64_t count = a.counts ? a.counts[place.count_offset + head * a.count_head] : a.count;
  return static_cast<int>(min(max(count, int64_t{0}), static_cast<int64_t>(list_width)));
}

// Entries [first, first + 4) of a list with `count`, which begins at `list`.
__device__ int4 four_entries(const ListArgs& a, int64_t list, int first, int count, int num_visible) {
  int4 ids = {kNoBlock, kNoBlock, kNoBlock, kNoBlock};
  if (first >= count) return ids;
  if (a.in_fours && a.index_is_int64) {
    const auto* from = reinterpret_cast<const longlong2*>(static_cast<const int64_t*>(a.indices) + list + first);
    const longlong2 low = from[0], high = from[1];
    ids = {valid_id(low.x, num_visible), valid_id(low.y, num_visible), valid_id(high.x, num_visible),
           valid_id(high.y, num_visible)};
  } else if (a.in_fours) {
    const int4 four = *reinterpret_cast<const int4*>(static_cast<const int32_t*>(a.indices) + list + first);
    ids = {valid_id(four.x, num_visible), valid_id(four.y, num_visible), valid_id(four.z, num_visible),
           valid_id(four.w, num_visible)};
  } else {
    const auto read = [&](int i) { return i < count ? entry(a, list + i * a.index_entry, num_visible) : kNoBlock; };
    return {read(first), read(first + 1), read(first + 2), read(first + 3)};
  }
  if (first + 1 >= count) ids.y = kNoBlock;
  if (first + 2 >= count) ids.z = kNoBlock;
  if (first + 3 >= count) ids.w = kNoBlock;
  return ids;
}

// Block numbers of the packed batch for those of a sequence.
__device__ int4 number_blocks(int4 ids, int first_block) {
  const auto number = [=](int id) { return id == kNoBlock ? id : first_block + id; };
  return {number(ids.x), number(ids.y), number(ids.z), number(ids.w)};
}

// Whether the four follow each other, and the next lane's follow them; last: they end a list.
__device__ bool in_order(int4 ids, bool last) {
  const auto follows = [](int next, int id) { return id < next || next == kNoBlock; };
  const int next = __shfl_down_sync(kFullWarp, ids.x, 1);
  return follows(ids.y, ids.x) && follows(ids.z, ids.y) && follows(ids.w, ids.z) && (last || follows(next, ids.w));
}

// The place of an entry in its list of `width` lanes (16 or 32), which holds it once; repeated and absent ones, which
// become kNoBlock, share out the places behind.
__device__ int rank_entry(int& id, int lane, int width) {
  const unsigned long long key =
      (static_cast<unsigned long long>(threadIdx.x % 32 / width) << 32) | static_cast<unsigned>(id);
  const bool first = __ffs(__match_any_sync(kFullWarp, key)) - 1 == static_cast<int>(threadIdx.x % 32);
  if (!first) id = kNoBlock;
  int rank = 0;
  for (int i = 0; i < width; ++i) {
    const int other = __shfl_sync(kFullWarp, id, i, width);
    rank += other < id || (other == kNoBlock && id == kNoBlock && i < lane);
  }
  return rank;
}

// Lists of which a warp holds four entries a lane, written in order and each entry once: a lane an entry, so in four
// rounds. out: a lane's list, null: none.
__device__ void sort_held(int4 ids, int32_t* out, int list_width, int width) {
  const int lane = threadIdx.x % width;
  for (int round = 0; round < 4; ++round) {
    const int from = 8 * round + threadIdx.x % 32 / 4;  // that lane's four hold this one's entry
    const int four[4] = {__shfl_sync(kFullWarp, ids.x, from), __shfl_sync(kFullWarp, ids.y, from),
                         __shfl_sync(kFullWarp, ids.z, from), __shfl_sync(kFullWarp, ids.w, from)};
    const int i = lane % 4;
    int id = i == 0 ? four[0] : i == 1 ? four[1] : i == 2 ? four[2] : four[3];
    auto* const to = reinterpret_cast<int32_t*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(out), from));
    const int rank = rank_entry(id, lane, width);
    if (to && rank < list_width) to[rank] = id;
  }
}

// Lists of at most `width` (16 or 32) entries, width / 4 lanes each. Most come in order, as select_blocks makes them,
// and are written as they were read.
__global__ void __launch_bounds__(32 * kListWarps) sort_short_lists(ListArgs a, Plan plan, int width) {
  const int lanes = width / 4;
  const int group = (blockIdx.x * blockDim.x + threadIdx.x) / lanes, first = 4 * (threadIdx.x % lanes);
  const int num_groups = gridDim.x * blockDim.x / lanes;
  const int64_t num_lists = static_cast<int64_t>(plan.total_q) * a.num_heads;
  const int64_t rounds = (num_lists + num_groups - 1) / num_groups;  // the same for a whole warp: shuffles inside
  int row = group / a.num_heads, head = group % a.num_heads;
  const int rows_a_round = num_groups / a.num_heads, heads_a_round = num_groups % a.num_heads;
  for (int64_t round = 0; round < rounds; ++round) {
    const bool real = row < plan.total_q;
    const RowPlace place = place_row(a, real ? row : 0, plan.block_size);
    const int count = real ? num_entries(a, place, head, plan.list_width) : 0;
    int4 ids = four_entries(a, place.index_offset + head * a.index_head, first, count, place.num_visible);
    ids = number_blocks(ids, place.first_block);
    int32_t* out = real ? a.lists + (static_cast<int64_t>(head) * plan.total_q + row) * plan.list_width : nullptr;
    if (!__all_sync(kFullWarp, in_order(ids, first + 4 == width))) {
      sort_held(ids, out, plan.list_width, width);
    } else if (real && plan.list_width % 4 == 0) {
      if (first < plan.list_width) *reinterpret_cast<int4*>(out + first) = ids;
    } else if (real) {
      const int four[4] = {ids.x, ids.y, ids.z, ids.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < plan.list_width) out[first + i] = four[i];
      }
    }
    if (real && head == 0 && first == 0) a.last_key[row] = place.last_key;
    row += rows_a_round;
    head += heads_a_round;
    if (head >= a.num_heads) {
      head -= a.num_heads;
      ++row;
    }
  }
}

// Any number of entries: a warp marks them in a bitmap of the sequence's blocks, a window at a time, and reads it back
// in order.
__global__ void __launch_bounds__(32 * kListWarps) sort_long_lists(ListArgs a, Plan plan) {
  __shared__ unsigned bitmaps[kListWarps][kWindowWords];
  const int lane = threadIdx.x % 32;
  unsigned* bitmap = bitmaps[threadIdx.x / 32];
  const int num_heads = a.num_heads;
  const int64_t num_lists = static_cast<int64_t>(plan.total_q) * num_heads;
  for (int64_t list = static_cast<int64_t>(blockIdx.x) * kListWarps + threadIdx.x / 32; list < num_lists;
       list += static_cast<int64_t>(gridDim.x) * kListWarps) {
    const int row = static_cast<int>(list / num_heads);
    const int head = static_cast<int>(list - static_cast<int64_t>(row) * num_heads);
    const RowPlace place = place_row(a, row, plan.block_size);
    const int count = num_entries(a, place, head, plan.list_width);
    const int64_t indices = place.index_offset + head * a.index_head;
    int32_t* out = a.lists + (static_cast<int64_t>(head) * plan.total_q + row) * plan.list_width;
    int written = 0;
    for (int window = 0; window < place.num_visible; window += 32 * kWindowWords) {
      const int words = min(kWindowWords, (place.num_visible - window + 31) / 32);
      for (int w = lane; w < words; w += 32) bitmap[w] = 0;
      __syncwarp();
      for (int i = lane; i < count; i += 32) {
        const int id = entry(a, indices + i * a.index_entry, place.num_visible);
        const int bit = id - window;
        if (id != kNoBlock && bit >= 0 && bit < 32 * words) atomicOr(&bitmap[bit / 32], 1u << (bit % 32));
      }
      __syncwarp();
      for (int base = 0; base < words; base += 32) {
        unsigned bits = base + lane < words ? bitmap[base + lane] : 0;
        const int mine = __popc(bits);
        const int up_to = device::sum_up_to_lane(mine, lane);
        int position = written + up_to - mine;
        written += __shfl_sync(kFullWarp, up_to, 31);
        for (; bits; bits &= bits - 1)
          out[position++] = place.first_block + window + (base + lane) * 32 + __ffs(bits) - 1;
      }
      __syncwarp();
    }
    for (int i = written + lane; i < plan.list_width; i += 32) out[i] = kNoBlock;
    if (head == 0 && lane == 0) a.last_key[row] = place.last_key;
  }
}

// With no entries there are no lists to sort, but rows still need their last key.
__global__ void make_last_keys(ListArgs a, Plan plan) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < plan.total_q) a.last_key[row] = place_row(a, row, plan.block_size).last_key;
}

}  // namespace

Plan carve_plan(const SelectedAttentionProblem& p, Carver& carver, int unit_alignment) {
  Plan plan = {};
  const bool packed = p.cu_seqlens_q != nullptr;
  plan.total_q = static_cast<int>(packed ? p.seqlen_q : p.batch * p.seqlen_q);
  plan.total_k = static_cast<int>(packed ? p.seqlen_k : p.batch * p.seqlen_k);
  const int64_t per_sequence = (p.seqlen_k + p.block_size - 1) / p.block_size;
  plan.num_blocks = static_cast<int>(packed ? p.seqlen_k / p.block_size + p.batch : p.batch * per_sequence);
  plan.block_size = static_cast<int>(p.block_size);
  plan.list_width = static_cast<int>(p.num_indices);
  plan.lists = carver.take<int32_t>(static_cast<int64_t>(plan.total_q) * p.num_heads_k * plan.list_width);
  plan.last_key = carver.take<int32_t>(plan.total_q);
  plan.blocks = carver.take<int2>(plan.num_blocks);
  const int group = static_cast<int>(p.num_heads_q / p.num_heads_k);
  Units& units = plan.units;
  units.runs = packed ? static_cast<int>(p.batch) + 2 : 1;
  units.tokens_per_run = plan.total_q;
  const int rows = 16 * unit_alignment;
  units.alignment = unit_alignment;
  if (!packed && p.seqlen_q * group % rows != 0) {
    units.runs = static_cast<int>(p.batch);
    units.tokens_per_run = static_cast<int>(p.seqlen_q);
  }
  units.units_per_run =
      static_cast<int>((static_cast<int64_t>(units.tokens_per_run) * group + rows - 1) / rows) * unit_alignment;
  units.max_units = packed ? units.units_per_run + units.runs * unit_alignment : units.runs * units.units_per_run;
  if (packed) {
    plan.q_begin = carver.take<int32_t>(p.batch + 1);
    plan.key_begin = carver.take<int32_t>(p.batch + 1);
    plan.block_begin = carver.take<int32_t>(p.batch + 1);
    units.token_begin = carver.take<int32_t>(units.runs + 1);
    units.unit_begin = carver.take<int32_t>(units.runs + 1);
  }
  return plan;
}

Status make_plan(const SelectedAttentionProblem& p, const Plan& plan, cudaStream_t stream) {
  ListArgs a = {};
  Sequences& s = a.sequences;
  s.batch = static_cast<int>(p.batch);
  if (p.cu_seqlens_q) {
    s.cu_q = p.cu_seqlens_q;
    s.cu_k = p.cu_seqlens_k;
    s.q_begin = const_cast<int32_t*>(plan.q_begin);
    s.key_begin = const_cast<int32_t*>(plan.key_begin);
    s.block_begin = const_cast<int32_t*>(plan.block_begin);
    s.token_begin = const_cast<int32_t*>(plan.units.token_begin);
    s.unit_begin = const_cast<int32_t*>(plan.units.unit_begin);
    repair_sequences<<<1, kSequenceThreads, 0, stream>>>(s, plan.total_q, plan.total_k, plan.block_size,
                                                         static_cast<int>(p.num_heads_q / p.num_heads_k),
                                                         plan.units.alignment);
  }
  if (plan.num_blocks > 0) {
    make_blocks<<<(plan.num_blocks + 255) / 256, 256, 0, stream>>>(
        s, plan.num_blocks, plan.block_size, static_cast<int>(p.seqlen_k), const_cast<int2*>(plan.blocks));
  }
  a.indices = p.block_indices.data;
  a.index_is_int64 = p.block_indices.type == IndexType::kInt64;
  a.index_batch = p.block_indices.batch_stride;
  a.index_row = p.block_indices.row_stride;
  a.index_head = p.block_indices.head_stride;
  a.index_entry = p.block_indices.entry_stride;
  a.counts = static_cast<const int32_t*>(p.block_counts.data);
  a.count_batch = p.block_counts.batch_stride;
  a.count_row = p.block_counts.row_stride;
  a.count_head = p.block_counts.head_stride;
  a.count = p.block_count < 0 ? p.num_indices : p.block_count;
  a.q_offsets = p.q_offsets;
  a.has_q_offset = p.has_q_offset;
  a.q_offset = clamp_far(p.q_offset);
  a.causal = p.causal;
  a.batch = static_cast<int>(p.batch);
  a.seqlen_q = static_cast<int>(p.seqlen_q);
  a.seqlen_k = static_cast<int>(p.seqlen_k);
  a.num_heads = static_cast<int>(p.num_heads_k);
  a.in_fours = plan.list_width % 4 == 0 && a.index_entry == 1 && a.index_batch % 4 == 0 && a.index_row % 4 == 0 &&
               a.index_head % 4 == 0 && reinterpret_cast<std::uintptr_t>(a.indices) % 16 == 0;
  a.lists = const_cast<int32_t*>(plan.lists);
  a.last_key = const_cast<int32_t*>(plan.last_key);
  const int64_t num_lists = static_cast<int64_t>(plan.total_q) * p.num_heads_k;
  if (plan.total_q > 0 && plan.list_width == 0) {
    make_last_keys<<<(plan.total_q + 255) / 256, 256, 0, stream>>>(a, plan);
  } else if (num_lists == 0) {
    return {};
  } else if (plan.list_width <= 32) {
    const int width = plan.list_width <= 16 ? 16 : 32;
    sort_short_lists<<<grid_size(num_lists * width / 4, 32 * kListWarps), 32 * kListWarps, 0, stream>>>(a, plan, width);
  } else {
    sort_long_lists<<<grid_size(num_lists, kListWarps), 32 * kListWarps, 0, stream>>>(a, plan);
  }
  return cuda_status(cudaGetLastError(), "selected attention: sorting the block lists");
}

}  // namespace nsa::cuda
