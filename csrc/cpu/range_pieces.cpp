#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/range_backward.h"

namespace nsa::cpu {
namespace {

// Enough pieces of work for many threads, few enough that the partial sums of compressed attention, where a piece may
// see every key, take at most 32 + 2 Hkv times the memory of one kv head's dK and dV.
constexpr std::int64_t kPiecesOfWork = 32;
// A shorter piece spends its time on adding up.
constexpr std::int64_t kLeastQueries = 64;

std::int64_t queries_per_piece(const RangeAttentionProblem& problem, const Ranges& ranges) {
  const std::int64_t pieces = (kPiecesOfWork + problem.num_heads_k - 1) / problem.num_heads_k;
  const std::int64_t queries = std::max(kLeastQueries, (ranges.total_q + pieces - 1) / pieces);
  return (queries + ranges.tile_queries - 1) / ranges.tile_queries * ranges.tile_queries;
}

// a * b, at most `most`. All are >= 0.
std::int64_t bounded_product(std::int64_t a, std::int64_t b, std::int64_t most) {
  std::int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? most : std::min(product, most);
}

// dst += src
template <typename Real>
void add_row(Real* sum, const Real* row, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += row[i];
}

// Sums of one key row over the pieces of its sequence, in ascending order.
template <typename Real>
void sum_key(const RangeBackward<Real>& b, std::int64_t head, std::int64_t sequence, std::int64_t k_row, Real* dk,
             Real* dv) {
  const RangePieces& r = b.pieces;
  for (std::int64_t i = r.piece_begin[sequence]; i < r.piece_begin[sequence + 1]; ++i) {
    const RangePiece& piece = r.pieces[i];
    if (k_row < piece.keys.begin || k_row >= piece.keys.end) continue;
    const std::int64_t sum = piece.first_sum + k_row - piece.keys.begin;
    if (b.need_dk()) add_row(dk, b.dk_sum(head, sum), b.problem.head_dim_qk);
    if (b.need_dv()) add_row(dv, b.dv_sum(head, sum), b.problem.head_dim_v);
  }
}

}  // namespace

RangePieces carve_range_pieces(const RangeAttentionProblem& problem, const Ranges& ranges, Carver& carver) {
  const std::int64_t queries = queries_per_piece(problem, ranges);
  const std::int64_t cuts = ranges.total_q / queries + 1;
  RangePieces r;
  r.max_count = std::min(ranges.total_q, cuts + ranges.batch);
  // The cuts leave at most one piece of any sequence between two of them: total_k keys each time. In a window, a
  // sequence in one piece has its own keys, all of these together total_k, and of the at most 2 * cuts other pieces one
  // with n queries sees fewer than n + 2 w keys.
  r.max_sums = bounded_product(cuts, ranges.total_k, std::int64_t{1} << 60);
  if (problem.mask == RangeMask::kWindow) {
    const std::int64_t windows = bounded_product(4 * cuts, problem.window_size, std::int64_t{1} << 60);
    r.max_sums = std::min(r.max_sums, ranges.total_k + ranges.total_q + windows);
  }
  r.pieces = carver.take<RangePiece>(r.max_count);
  r.piece_begin = carver.take<std::int64_t>(ranges.batch + 1);
  return r;
}

void fill_range_pieces(const RangeAttentionProblem& problem, const Ranges& ranges, const RangePieces& r) {
  const std::int64_t queries = queries_per_piece(problem, ranges);
  std::int64_t count = 0, sums = 0;
  for (std::int64_t b = 0; b < ranges.batch; ++b) {
    r.piece_begin[b] = count;
    const RangeSequence& s = ranges.sequences[b];
    // Cut where the rows of all sequences together reach a multiple, and at whole tiles of the sequence.
    for (std::int64_t begin = 0, end; begin < s.num_queries; begin = end) {
      const std::int64_t cut = ((s.q_begin + begin) / queries + 1) * queries - s.q_begin;
      const std::int64_t tiles = (cut + ranges.tile_queries - 1) / ranges.tile_queries;
      end = std::min(s.num_queries, tiles * ranges.tile_queries);
      const KeyRange seen = range_of_queries(problem, s, begin, end);
      r.pieces[count++] = {b, begin, end, {s.k_begin + seen.begin, s.k_begin + seen.end}, sums};
      sums += seen.end - seen.begin;
    }
  }
  r.piece_begin[ranges.batch] = count;
}

template <typename Real>
void add_range_pieces(const RangeBackward<Real>& b, Real* scratch) {
  constexpr std::int64_t kKeysPerPiece = 64;
  const RangeAttentionProblem& p = b.problem;
  const Ranges& ranges = b.ranges;
  const Dtype dtype = p.dtype;
  const std::int64_t dk_row = padded<Real>(p.head_dim_qk), dv_row = padded<Real>(p.head_dim_v);
  parallel_for(b.num_threads, ranges.total_k, kKeysPerPiece, [&](int thread, std::int64_t begin, std::int64_t end) {
    Real* const dk = scratch + thread * (dk_row + dv_row);
    Real* const dv = dk + dk_row;
    for (std::int64_t head = 0; head < p.num_heads_k; ++head) {
      for (std::int64_t k_row = begin; k_row < end; ++k_row) {
        std::fill(dk, dk + dk_row + dv_row, Real{0});
        const std::int64_t sequence = find_sequence(ranges.k_begin, ranges.batch, k_row);
        if (sequence >= 0 && sequence < ranges.batch) sum_key(b, head, sequence, k_row, dk, dv);
        const RowIndex index = index_of_k(p, k_row);
        if (b.need_dk()) {
          kernels<Real>().store(dtype, dk, p.head_dim_qk, address_of(b.args.dk, dtype, index, head));
        }
        if (b.need_dv()) {
          kernels<Real>().store(dtype, dv, p.head_dim_v, address_of(b.args.dv, dtype, index, head));
        }
      }
    }
  });
}

template void add_range_pieces(const RangeBackward<float>&, float*);
template void add_range_pieces(const RangeBackward<double>&, double*);

}  // namespace nsa::cpu
