// Range attention: who sees which run of keys, and how queries are cut into tiles.
//
// Rows of all sequences are numbered through, as in sequences.h. Compressed rows of k may be fewer than the tokens say
// (see nsa.h), so a sequence knows both.
#pragma once

#include <cstdint>

#include "cpu/packed_keys.h"
#include "cpu/sequences.h"
#include "cpu/workspace.h"
#include "nsa_cuda/nsa.h"

namespace nsa::cpu {

struct RangeSequence {
  std::int64_t q_begin = 0, num_queries = 0;  // q rows
  std::int64_t k_begin = 0, num_keys = 0;     // k rows
  std::int64_t num_tokens = 0;                // Tk
  std::int64_t position = 0;                  // of the first query
};

struct Ranges {
  std::int64_t batch = 0;                 // B
  std::int64_t total_q = 0, total_k = 0;  // rows
  std::int64_t tile_queries = 0;          // queries of one tile
  RangeSequence* sequences = nullptr;     // [B]
  std::int64_t* q_begin = nullptr;        // [B + 1] first q row of each sequence
  std::int64_t* k_begin = nullptr;        // [B + 1]
  std::int64_t* tile_begin = nullptr;     // [B + 1] tiles before each sequence
};

Ranges carve_ranges(const RangeAttentionProblem& problem, Carver& carver);
void fill_ranges(const RangeAttentionProblem& problem, const Ranges& ranges);

// The keys that the query at position p sees, counted from the sequence's first one; empty: a dead row. Both ends grow
// with p.
KeyRange range_at(const RangeAttentionProblem& problem, const RangeSequence& sequence, std::int64_t position);

// The keys that some of the queries [begin, end) of a sequence sees.
KeyRange range_of_queries(const RangeAttentionProblem& problem, const RangeSequence& sequence, std::int64_t begin,
                          std::int64_t end);

// floor(a / b), b > 0
constexpr std::int64_t floor_divide(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// Queries [begin, end) of a sequence.
struct QueryTile {
  std::int64_t sequence = 0;
  std::int64_t begin = 0, end = 0;
};

// Tile 0 .. tile_begin[B] - 1.
QueryTile tile_at(const Ranges& ranges, std::int64_t tile);

// Calls body(q row) for the rows outside every sequence.
template <typename Body>
void for_outside_rows(const std::int64_t* begin, std::int64_t batch, std::int64_t total, const Body& body) {
  for (std::int64_t row = 0; row < begin[0]; ++row) body(row);
  for (std::int64_t row = begin[batch]; row < total; ++row) body(row);
}

// Fills what isn't null from k or v [.., Hkv, D], for the keys that some query sees.
template <typename Real>
void pack_ranges(const RangeAttentionProblem& problem, const Ranges& ranges, const Tensor& tensor,
                 const KeyColumns<Real>& columns, const KeyRows<Real>& rows, int num_threads);

// Walks a run of keys, given as k rows, in chunks that end where panels do, so that all but the first piece of a chunk
// begins a panel.
class RangeWalk {
 public:
  explicit RangeWalk(KeyRange keys) : next_(keys.begin), end_(keys.end) {}

  // At most `capacity` keys, a multiple of kPanelKeys; returns how many, 0 at the end. Key first() stands in column 0.
  std::int64_t next(std::int64_t capacity, KeyPiece* pieces, std::int64_t* num_pieces) {
    first_ = next_;
    const std::int64_t end = std::min(end_, next_ / kPanelKeys * kPanelKeys + capacity);
    *num_pieces = 0;
    while (next_ < end) {
      const std::int64_t count = std::min(end, (next_ / kPanelKeys + 1) * kPanelKeys) - next_;
      pieces[(*num_pieces)++] = {next_, count, next_ - first_};
      next_ += count;
    }
    return next_ - first_;
  }
  std::int64_t first() const { return first_; }

 private:
  std::int64_t first_ = 0, next_, end_;
};

}  // namespace nsa::cpu
