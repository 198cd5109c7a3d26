#include "cpu/ranges.h"

#include <algorithm>
#include <limits>

#include "cpu/parallel.h"

namespace nsa::cpu {
namespace {

// Query rows (tokens times G) of a tile: every key that is read is used for that many.
constexpr std::int64_t kTileRows = 64;

std::int64_t count_compressed(const RangeAttentionProblem& problem, std::int64_t tokens) {
  return tokens < problem.kernel_size ? 0 : (tokens - problem.kernel_size) / problem.kernel_stride + 1;
}

}  // namespace

Ranges carve_ranges(const RangeAttentionProblem& problem, Carver& carver) {
  const std::int64_t copies = is_packed(problem) ? 1 : problem.batch;
  Ranges r;
  r.total_q = copies * problem.seqlen_q;
  r.total_k = copies * problem.seqlen_k;
  // Without rows any batch is valid, up to 2^63 - 1, and [B + 1] offsets would overflow the workspace's size.
  r.batch = is_packed(problem) || r.total_q + r.total_k > 0 ? problem.batch : 0;
  r.tile_queries = std::max<std::int64_t>(1, kTileRows / (problem.num_heads_q / problem.num_heads_k));
  r.sequences = carver.take<RangeSequence>(r.batch);
  r.q_begin = carver.take<std::int64_t>(r.batch + 1);
  r.k_begin = carver.take<std::int64_t>(r.batch + 1);
  r.tile_begin = carver.take<std::int64_t>(r.batch + 1);
  return r;
}

void fill_ranges(const RangeAttentionProblem& problem, const Ranges& r) {
  const bool compressed = problem.mask == RangeMask::kCompressed;
  if (is_packed(problem)) {
    repair_offsets(problem.cu_seqlens_q, r.batch, r.total_q, r.q_begin);
    // Of tokens: how many there are behind compressed rows is not known.
    const std::int64_t most = compressed ? std::numeric_limits<std::int64_t>::max() : r.total_k;
    repair_offsets(problem.cu_seqlens_k, r.batch, most, r.k_begin);
  } else {
    for (std::int64_t b = 0; b <= r.batch; ++b) {
      r.q_begin[b] = b * problem.seqlen_q;
      r.k_begin[b] = b * problem.seqlen_k;
    }
  }
  r.tile_begin[0] = 0;
  std::int64_t next_k = is_packed(problem) && compressed ? 0 : r.k_begin[0];
  for (std::int64_t b = 0; b < r.batch; ++b) {
    RangeSequence& s = r.sequences[b];
    s.q_begin = r.q_begin[b];
    s.num_queries = r.q_begin[b + 1] - s.q_begin;
    s.num_tokens = compressed && !is_packed(problem) ? problem.num_tokens : r.k_begin[b + 1] - r.k_begin[b];
    s.k_begin = is_packed(problem) ? next_k : b * problem.seqlen_k;
    s.num_keys = compressed ? count_compressed(problem, s.num_tokens) : s.num_tokens;
    s.num_keys = std::min(s.num_keys, r.total_k - s.k_begin);
    s.position = position_of_first_query(problem, b, s.num_queries, s.num_tokens);
    next_k = s.k_begin + s.num_keys;
    r.tile_begin[b + 1] = r.tile_begin[b] + (s.num_queries + r.tile_queries - 1) / r.tile_queries;
  }
  // From here on k_begin counts rows, where it counted tokens.
  if (!is_packed(problem) || !compressed) return;
  for (std::int64_t b = 0; b < r.batch; ++b) r.k_begin[b] = r.sequences[b].k_begin;
  r.k_begin[r.batch] = next_k;
}

KeyRange range_at(const RangeAttentionProblem& problem, const RangeSequence& sequence, std::int64_t position) {
  if (sequence.num_keys == 0) return {};
  const auto inside = [&](std::int64_t key) { return std::clamp<std::int64_t>(key, 0, sequence.num_keys); };
  if (problem.mask == RangeMask::kWindow) {
    // Wider than any sequence, and far from overflowing.
    const std::int64_t width = std::min(problem.window_size, std::int64_t{1} << 60);
    return {inside(position - width + 1), inside(position + (problem.causal ? 1 : width))};
  }
  if (!problem.causal) return {0, sequence.num_keys};
  return {0, inside(floor_divide(position - problem.kernel_size + 1, problem.kernel_stride) + 1)};
}

KeyRange range_of_queries(const RangeAttentionProblem& problem, const RangeSequence& sequence, std::int64_t begin,
                          std::int64_t end) {
  if (begin >= end) return {};
  return {range_at(problem, sequence, sequence.position + begin).begin,
          range_at(problem, sequence, sequence.position + end - 1).end};
}

QueryTile tile_at(const Ranges& r, std::int64_t tile) {
  const std::int64_t b = find_sequence(r.tile_begin, r.batch, tile);
  const std::int64_t begin = (tile - r.tile_begin[b]) * r.tile_queries;
  return {b, begin, std::min(begin + r.tile_queries, r.sequences[b].num_queries)};
}

template <typename Real>
void pack_ranges(const RangeAttentionProblem& problem, const Ranges& ranges, const Tensor& tensor,
                 const KeyColumns<Real>& columns, const KeyRows<Real>& rows, int num_threads) {
  constexpr std::int64_t kPanelsPerPiece = 8;
  const std::int64_t panels = count_panels(ranges);
  const std::int64_t row_bytes = tensor.row_stride * bytes_of(problem.dtype);
  parallel_for(num_threads, problem.num_heads_k * panels, kPanelsPerPiece,
               [&](int, std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   const std::int64_t head = i / panels, first = i % panels * kPanelKeys;
                   std::int64_t b = std::max<std::int64_t>(0, find_sequence(ranges.k_begin, ranges.batch, first));
                   // A panel may hold rows of several sequences.
                   for (; b < ranges.batch && ranges.k_begin[b] < first + kPanelKeys; ++b) {
                     const RangeSequence& s = ranges.sequences[b];
                     const KeyRange seen = range_of_queries(problem, s, 0, s.num_queries);
                     const std::int64_t run = std::max(first, s.k_begin + seen.begin);
                     const std::int64_t run_end = std::min(first + kPanelKeys, s.k_begin + seen.end);
                     if (run >= run_end) continue;
                     const RowIndex index = index_of_k(problem, run);
                     pack_run(problem.dtype, address_of(tensor, problem.dtype, index, head), row_bytes, head, run,
                              run_end - run, columns, rows);
                   }
                 }
               });
}

template void pack_ranges(const RangeAttentionProblem&, const Ranges&, const Tensor&, const KeyColumns<float>&,
                          const KeyRows<float>&, int);
template void pack_ranges(const RangeAttentionProblem&, const Ranges&, const Tensor&, const KeyColumns<double>&,
                          const KeyRows<double>&, int);

}  // namespace nsa::cpu
