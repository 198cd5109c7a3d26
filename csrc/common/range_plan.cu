// Turns masks, cu_seqlens, offsets and causality into the runs of a RangePlan.
#include "common/range_plan.h"

#include <cuda_runtime.h>

#include "common/integers.h"
#include "common/sequences.cuh"

namespace nsa::cuda {
namespace {

struct RangeArgs {
  const int32_t *cu_q, *cu_k, *q_offsets;
  int64_t q_offset, window;
  bool has_q_offset, causal, compressed;
  int batch, seqlen_q, seqlen_k;  // rows of a sequence, batched
  int num_tokens;                 // behind the keys of a sequence, batched
  int kernel_size, kernel_stride;
  int group;
};

// One CTA. Writes every table of a packed plan.
__global__ void __launch_bounds__(kSequenceThreads) lay_sequences(RangeArgs a, RangePlan plan) {
  __shared__ SequenceScan::Scan::TempStorage storage;
  SequenceScan scan(storage);
  scan.repair(a.cu_q, plan.q_begin, a.batch, plan.total_q);
  scan.repair(a.cu_k, plan.key_token_begin, a.batch, a.compressed ? INT_MAX : plan.total_k);
  const int32_t* tokens = plan.key_token_begin;
  if (a.compressed) {
    scan.lay_compressed_keys(tokens, a.batch, a.kernel_size, a.kernel_stride, plan.total_k, plan.key_begin);
  } else {
    for (int b = threadIdx.x; b <= a.batch; b += kSequenceThreads) plan.key_begin[b] = tokens[b];
  }
  __syncthreads();
  auto* q_token = const_cast<int32_t*>(plan.units.token_begin);
  auto* k_row = const_cast<int32_t*>(plan.key_units.token_begin);
  auto* k_unit = const_cast<int32_t*>(plan.key_units.unit_begin);
  scan.lay_units(plan.q_begin, a.batch, plan.total_q, a.group, plan.units.alignment, q_token,
                 const_cast<int32_t*>(plan.units.unit_begin));
  scan.lay_units(plan.key_begin, a.batch, plan.total_k, 1, plan.key_units.alignment, k_row, k_unit);
  scan.sum_before(a.batch + 2, const_cast<int32_t*>(plan.partial_begin), [&](int run) {
    const int length = q_token[run + 1] - q_token[run];
    const int chunks = length / plan.chunk + (length % plan.chunk != 0);
    return chunks > 1 ? (k_unit[run + 1] - k_unit[run]) / plan.key_units.alignment * chunks : 0;
  });
}

// A sequence, and one of its rows.
struct Place {
  int row;  // in the sequence
  int q_begin, q_length, k_begin, k_length;
  int64_t offset;  // p = row of q + offset
};

__device__ bool find_place(const RangeArgs& a, const RangePlan& plan, bool is_query, int row, Place& place) {
  int b, tokens;
  if (a.cu_q) {
    b = find_sequence(is_query ? plan.q_begin : plan.key_begin, a.batch, row);
    if (b < 0 || b >= a.batch) return false;
    place.q_begin = plan.q_begin[b];
    place.q_length = plan.q_begin[b + 1] - place.q_begin;
    place.k_begin = plan.key_begin[b];
    place.k_length = plan.key_begin[b + 1] - place.k_begin;
    tokens = plan.key_token_begin[b + 1] - plan.key_token_begin[b];
  } else {
    b = row / (is_query ? a.seqlen_q : plan.run_k);
    place.q_begin = b * a.seqlen_q;
    place.q_length = a.seqlen_q;
    place.k_begin = b * plan.run_k;
    place.k_length = a.seqlen_k;
    tokens = a.num_tokens;
  }
  place.row = row - (is_query ? place.q_begin : place.k_begin);
  place.offset = a.q_offsets ? a.q_offsets[b] : a.has_q_offset ? a.q_offset : int64_t{tokens} - place.q_length;
  return true;
}

// [first, end) of a sequence of `length` rows that begin at `begin`, ends clamped so that they still ascend.
__device__ int2 clamp_run(int64_t first, int64_t end, int begin, int length) {
  const auto clamp = [&](int64_t x) { return begin + static_cast<int>(min(max(x, int64_t{0}), int64_t{length})); };
  return {clamp(first), clamp(end)};
}

__global__ void make_runs(RangeArgs a, RangePlan plan) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_query = thread < plan.total_q;
  const int row = is_query ? thread : thread - plan.total_q;
  if (!is_query && row >= plan.total_k) return;
  Place place;
  int2 run = {0, 0};
  if (find_place(a, plan, is_query, row, place)) {
    const int64_t l = a.kernel_size, d = a.kernel_stride;
    if (is_query) {
      const int64_t p = place.row + place.offset;
      int64_t first = 0, end = kFar;
      if (!a.compressed) {
        first = p - a.window + 1;
        end = a.causal ? p + 1 : p + a.window;
      } else if (a.causal) {
        end = p >= l - 1 ? (p - l + 1) / d + 1 : 0;
      }
      run = clamp_run(first, end, place.k_begin, place.k_length);
    } else if (place.row < place.k_length) {  // batched: rows behind Nc are seen by nobody
      int64_t first = -kFar, end = kFar;      // positions
      if (!a.compressed) {
        first = a.causal ? place.row : place.row - a.window + 1;
        end = place.row + a.window;
      } else if (a.causal) {
        first = place.row * d + l - 1;
      }
      run = clamp_run(first - place.offset, end - place.offset, place.q_begin, place.q_length);
    } else {
      run = {place.q_begin + place.q_length, place.q_begin + place.q_length};
    }
  }
  const_cast<int2*>(is_query ? plan.keys : plan.queries)[row] = run;
}

Units make_units(bool packed, int64_t batch, int64_t rows, int64_t group, int alignment, Carver& carver) {
  Units units = {};
  units.runs = static_cast<int>(packed ? batch + 2 : batch);
  units.tokens_per_run = static_cast<int>(rows);
  units.alignment = alignment;
  units.units_per_run = static_cast<int>(divide_up(rows * group, 16 * alignment)) * alignment;
  units.max_units = packed ? units.units_per_run + units.runs * alignment : units.runs * units.units_per_run;
  if (packed) {
    units.token_begin = carver.take<int32_t>(units.runs + 1);
    units.unit_begin = carver.take<int32_t>(units.runs + 1);
  }
  return units;
}

// A work item of dK and dV takes a sixteenth of the q rows: the longest key tile then makes 16 of them, enough to fill
// a GPU from 8 key tiles on, and the partial tiles stay below 1/7 of q's bytes at 64K tokens.
constexpr int kChunks = 16, kMinChunkRows = 4096;

void choose_chunks(const RangeAttentionProblem& p, RangePlan& plan) {
  const int64_t group = p.num_heads_q / p.num_heads_k;
  const int64_t shortest = divide_up(kMinChunkRows, group);
  int64_t chunk = divide_up(p.seqlen_q, kChunks);
  if (chunk < shortest) chunk = shortest;
  if (p.mask == RangeMask::kWindow) {  // a short run stays whole
    const int64_t run =
        (p.causal ? 1 : 2) * (p.window_size < kFar ? p.window_size : kFar) + 16 * plan.key_units.alignment;
    if (run <= 2 * chunk) chunk = INT_MAX;
  }
  const int64_t chunks = divide_up(p.seqlen_q, chunk);
  plan.chunk = static_cast<int>(chunk < INT_MAX ? chunk : INT_MAX);
  plan.max_chunks = static_cast<int>(chunks < 1 ? 1 : chunks);
  if (chunks <= 1) return;
  const int64_t tiles = divide_up(plan.run_k, 16 * plan.key_units.alignment);
  plan.partials_per_run = static_cast<int>(tiles * chunks);
  // Packed: only sequences longer than a chunk are split, at most max_chunks of them; their tiles are at most `tiles`
  // and one broken tile each, their chunks together at most twice max_chunks.
  plan.max_partials = static_cast<int>(p.cu_seqlens_q ? (tiles + 2) * chunks : p.batch * tiles * chunks);
}

}  // namespace

int64_t range_keys(const RangeAttentionProblem& p) {
  if (p.mask == RangeMask::kWindow) return p.seqlen_k;
  const int64_t keys = p.num_tokens < p.kernel_size ? 0 : (p.num_tokens - p.kernel_size) / p.kernel_stride + 1;
  return keys < p.seqlen_k ? keys : p.seqlen_k;
}

RangePlan carve_range_plan(const RangeAttentionProblem& p, const RangeTiles& tiles, Carver& carver) {
  RangePlan plan = {};
  const bool packed = p.cu_seqlens_q != nullptr;
  plan.total_q = static_cast<int>(packed ? p.seqlen_q : p.batch * p.seqlen_q);
  plan.total_k = static_cast<int>(packed ? p.seqlen_k : p.batch * p.seqlen_k);
  plan.run_k = static_cast<int>(p.seqlen_k);
  plan.run_keys = static_cast<int>(range_keys(p));
  plan.keys = carver.take<int2>(plan.total_q);
  plan.queries = carver.take<int2>(plan.total_k);
  plan.units = make_units(packed, p.batch, p.seqlen_q, p.num_heads_q / p.num_heads_k, tiles.query_units, carver);
  plan.key_units = make_units(packed, p.batch, p.seqlen_k, 1, tiles.key_units, carver);
  choose_chunks(p, plan);
  if (packed) {
    plan.partial_begin = carver.take<int32_t>(p.batch + 3);
    plan.q_begin = carver.take<int32_t>(p.batch + 1);
    plan.key_token_begin = carver.take<int32_t>(p.batch + 1);
    plan.key_begin = carver.take<int32_t>(p.batch + 1);
  }
  return plan;
}

Status make_range_plan(const RangeAttentionProblem& p, const RangePlan& plan, cudaStream_t stream) {
  RangeArgs a = {};
  a.cu_q = p.cu_seqlens_q;
  a.cu_k = p.cu_seqlens_k;
  a.q_offsets = p.q_offsets;
  a.has_q_offset = p.has_q_offset;
  a.q_offset = clamp_far(p.q_offset);
  a.window = p.window_size < kFar ? p.window_size : kFar;
  a.causal = p.causal;
  a.compressed = p.mask == RangeMask::kCompressed;
  a.batch = static_cast<int>(p.batch);
  a.seqlen_q = static_cast<int>(p.seqlen_q);
  a.seqlen_k = plan.run_keys;
  a.num_tokens = static_cast<int>(a.compressed ? p.num_tokens : p.seqlen_k);
  a.kernel_size = clamp_int(p.kernel_size);
  a.kernel_stride = clamp_int(p.kernel_stride);
  a.group = static_cast<int>(p.num_heads_q / p.num_heads_k);
  if (a.cu_q) lay_sequences<<<1, kSequenceThreads, 0, stream>>>(a, plan);
  const int64_t rows = static_cast<int64_t>(plan.total_q) + plan.total_k;
  if (rows > 0) make_runs<<<static_cast<unsigned>((rows + 255) / 256), 256, 0, stream>>>(a, plan);
  return cuda_status(cudaGetLastError(), "range attention: finding the runs");
}

}  // namespace nsa::cuda
