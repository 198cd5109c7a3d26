// One tile of query rows (queries times the G heads of one kv head) against the keys that they see.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/query_scratch.h"
#include "cpu/ranges.h"

namespace nsa::cpu {

inline std::int64_t rows_per_tile(const RangeAttentionProblem& problem, const Ranges& ranges) {
  return ranges.tile_queries * (problem.num_heads_q / problem.num_heads_k);
}

// Of queries [begin, end) of a sequence and the G heads of one kv head. Row r is query begin + r / G, head r % G.
struct RangeTile {
  const RangeAttentionProblem& problem;
  const RangeSequence& sequence;
  std::int64_t begin, end;  // queries
  std::int64_t head;        // kv head

  std::int64_t group() const { return problem.num_heads_q / problem.num_heads_k; }
  std::int64_t rows() const { return (end - begin) * group(); }
  RowIndex index(std::int64_t row) const { return index_of_q(problem, sequence.q_begin + begin + row / group()); }
  std::int64_t head_q(std::int64_t row) const { return head * group() + row % group(); }
  // Keys of one row, as k rows.
  KeyRange keys(std::int64_t row) const {
    const KeyRange range = range_at(problem, sequence, sequence.position + begin + row / group());
    return {sequence.k_begin + range.begin, sequence.k_begin + range.end};
  }
  // Keys of all rows.
  KeyRange keys() const {
    const KeyRange range = range_of_queries(problem, sequence, begin, end);
    return {sequence.k_begin + range.begin, sequence.k_begin + range.end};
  }
  // The columns that each row sees of a chunk whose column 0 is k row `first`: [rows] each.
  void columns_of_chunk(std::int64_t first, std::int64_t columns, std::int64_t* first_column,
                        std::int64_t* end_column) const {
    for (std::int64_t row = 0; row < rows(); row += group()) {
      const KeyRange seen = keys(row);
      const std::int64_t from = std::clamp<std::int64_t>(seen.begin - first, 0, columns);
      const std::int64_t to = std::clamp<std::int64_t>(seen.end - first, 0, columns);
      std::fill(first_column + row, first_column + row + group(), from);
      std::fill(end_column + row, end_column + row + group(), to);
    }
  }
};

// Loads the tile's rows of q or of a tensor like o; zeros for dead rows, where do may hold anything.
template <typename Real>
void load_rows(const RangeTile& tile, const Tensor& tensor, std::int64_t dim, Real* target, std::int64_t row_stride) {
  const Kernels<Real>& kernel = kernels<Real>();
  const Dtype dtype = tile.problem.dtype;
  for (std::int64_t row = 0; row < tile.rows(); ++row) {
    Real* const to = target + row * row_stride;
    const KeyRange seen = tile.keys(row);
    if (seen.begin < seen.end) {
      kernel.load(dtype, address_of(tensor, dtype, tile.index(row), tile.head_q(row)), dim, to);
    } else {
      std::fill(to, to + dim, Real{0});
    }
  }
}

// Calls body(tile, scratch) for every tile of every kv head, on num_threads threads with bytes of scratch each.
template <typename Body>
void for_range_tiles(const RangeAttentionProblem& problem, const Ranges& ranges, int num_threads, char* scratch,
                     std::size_t bytes, const Body& body) {
  const std::int64_t tiles = ranges.tile_begin[ranges.batch];
  // Head by head, so that the tiles at work share K and V in the caches.
  parallel_for(num_threads, tiles * problem.num_heads_k, 1, [&](int thread, std::int64_t i, std::int64_t) {
    const QueryTile queries = tile_at(ranges, i % tiles);
    const RangeTile tile{problem, ranges.sequences[queries.sequence], queries.begin, queries.end, i / tiles};
    body(tile, scratch + static_cast<std::size_t>(thread) * bytes);
  });
}

}  // namespace nsa::cpu
