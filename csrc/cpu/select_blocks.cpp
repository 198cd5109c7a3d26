// The blocks that each query attends to: the probabilities of the compressed branch, recomputed chunk by chunk, pooled
// to blocks and ranked as they come. A thread holds the masses of one chunk and of the keys that an unfinished block
// still needs.
#include <algorithm>
#include <limits>

#include "cpu/block_ranking.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/range_tile.h"

namespace nsa::cpu {
namespace {

template <typename Real>
struct Selection {
  const BlockSelection& args;
  const RangeAttentionProblem& problem;
  Ranges ranges;
  KeyColumns<Real> k;         // [Hkv, panels, Dk, 64]
  std::int64_t step, before;  // block j pools the keys [step j - before, step (j + 1)): l'/d and l/d - 1
  Real* weights;              // [before + step] of those keys
};

template <typename Real>
Selection<Real> carve_selection(const BlockSelection& args, Carver& carver) {
  const RangeAttentionProblem& p = args.problem;
  const Ranges ranges = carve_ranges(p, carver);
  const std::int64_t step = args.block_size / p.kernel_stride, before = p.kernel_size / p.kernel_stride - 1;
  return {args,
          p,
          ranges,
          carve_key_columns<Real>(p.num_heads_k, p.head_dim_qk, ranges, carver),
          step,
          before,
          carver.take<Real>(before + step)};
}

// Key step j + u has the weight of all (m, n) with m - n = u, m < l'/d, n < l/d: the units of d tokens that it shares
// with block j.
template <typename Real>
void fill_weights(const Selection<Real>& s) {
  for (std::int64_t u = -s.before; u < s.step; ++u) {
    const std::int64_t pairs = std::min(s.step - 1, u + s.before) - std::max<std::int64_t>(0, u) + 1;
    s.weights[u + s.before] = static_cast<Real>(pairs);
  }
}

template <typename Real>
struct Scratch {
  QueryScratch<Real> tile;
  Real* lse;                     // [rows]
  Real* mass;                    // [queries, mass_row] of consecutive keys
  std::int64_t mass_row;         // a block's keys and a chunk fit in
  BlockRanking<Real>* rankings;  // [queries]

  static Scratch carve(const Selection<Real>& s, Carver& carver) {
    const std::int64_t rows = rows_per_tile(s.problem, s.ranges), queries = s.ranges.tile_queries;
    Scratch scratch;
    RangeAttentionProblem without_v = s.problem;
    without_v.head_dim_v = 1;
    scratch.tile = QueryScratch<Real>::carve(without_v, rows, false, carver);
    scratch.lse = carver.take<Real>(rows);
    scratch.mass_row = padded<Real>(s.before + s.step + scratch.tile.chunk) + padded<Real>(1);
    scratch.mass = carver.take<Real>(queries * scratch.mass_row);
    scratch.rankings = carver.take<BlockRanking<Real>>(queries);
    Real* const scores = carver.take<Real>(queries * s.args.topk);
    std::int32_t* const ids = carver.take<std::int32_t>(queries * s.args.topk);
    for (std::int64_t i = 0; scores != nullptr && i < queries; ++i) {
      scratch.rankings[i] = {.scores = scores + i * s.args.topk, .ids = ids + i * s.args.topk};
    }
    return scratch;
  }
};

template <typename Real>
std::size_t scratch_bytes(const Selection<Real>& s) {
  Carver carver(nullptr);
  Scratch<Real>::carve(s, carver);
  return carver.used();
}

// The masses that a thread holds: column 0 is key `first`, and there are `count` of them.
struct HeldMasses {
  std::int64_t first, count;
};

// Offers block `id` to the queries that it is open to. The order of the sum is that of the keys, for every block.
template <typename Real>
void offer_block(const Selection<Real>& s, const RangeTile& tile, const Scratch<Real>& scratch, std::int64_t first_key,
                 std::int64_t id) {
  for (std::int64_t i = 0; i < tile.end - tile.begin; ++i) {
    BlockRanking<Real>& ranking = scratch.rankings[i];
    if (id >= ranking.candidates.count || ranking.candidates.is_forced(id) || !ranking.is_open(s.args.topk)) continue;
    const Real* const mass = scratch.mass + i * scratch.mass_row + s.step * id - s.before - first_key;
    Real score = 0;
    for (std::int64_t u = 0; u < s.before + s.step; ++u) {
      const Real share = s.weights[u] * mass[u];
      score += share;
    }
    ranking.offer(id, score);
  }
}

// Offers the blocks whose keys are all held, from *next on and before `end`, and drops the masses that no later block
// needs.
template <typename Real>
void offer_blocks(const Selection<Real>& s, const RangeTile& tile, const Scratch<Real>& scratch, HeldMasses* held,
                  std::int64_t* next, std::int64_t end) {
  for (; *next < end && s.step * (*next + 1) <= held->first + held->count; ++*next) {
    offer_block(s, tile, scratch, held->first, *next);
  }
  const std::int64_t dropped = s.step * *next - s.before - held->first;
  held->first += dropped;
  held->count -= dropped;
  for (std::int64_t i = 0; i < tile.end - tile.begin; ++i) {
    Real* const mass = scratch.mass + i * scratch.mass_row;
    std::copy(mass + dropped, mass + dropped + held->count, mass);
  }
}

// The masses of the keys of one chunk, for every query of the tile.
template <typename Real>
void add_masses(const Selection<Real>& s, const RangeTile& tile, const Scratch<Real>& scratch, std::int64_t first_key,
                std::int64_t columns, std::int64_t num_pieces, HeldMasses* held) {
  const QueryScratch<Real>& q = scratch.tile;
  multiply_by_columns(kernels<Real>(), tile.rows(), q.q, q.q_row, s.k, tile.head, q.pieces, num_pieces, q.scores,
                      q.score_row);
  const std::int64_t queries = tile.end - tile.begin;
  for (std::int64_t i = 0; i < queries; ++i) {
    q.end[i] = std::clamp<std::int64_t>(tile.keys(i * tile.group()).end - first_key, 0, columns);
  }
  kernels<Real>().group_mass({.queries = queries,
                              .group = tile.group(),
                              .columns = columns,
                              .scale = static_cast<Real>(s.problem.softmax_scale),
                              .scores = q.scores,
                              .scores_row = q.score_row,
                              .lse = scratch.lse,
                              .end = q.end,
                              .mass = scratch.mass + held->count,
                              .mass_row = scratch.mass_row});
  held->count += columns;
}

// Ranks the blocks of one tile's queries that are not forced.
template <typename Real>
void rank_blocks(const Selection<Real>& s, const RangeTile& tile, const Scratch<Real>& scratch,
                 std::int64_t num_blocks) {
  const std::int64_t queries = tile.end - tile.begin;
  load_rows(tile, s.args.q, s.problem.head_dim_qk, scratch.tile.q, scratch.tile.q_row);
  for (std::int64_t row = 0; row < tile.rows(); ++row) {
    const std::int64_t offset = offset_of(s.args.lse, tile.index(row), tile.head_q(row));
    scratch.lse[row] = static_cast<const Real*>(s.args.lse.data)[offset];
  }
  const auto add_zeros = [&](std::int64_t count, HeldMasses* held) {
    for (std::int64_t i = 0; i < queries; ++i) {
      Real* const mass = scratch.mass + i * scratch.mass_row + held->count;
      std::fill(mass, mass + count, Real{0});
    }
    held->count += count;
  };
  HeldMasses held{-s.before, 0};
  add_zeros(s.before, &held);
  std::int64_t next = 0, num_pieces;
  RangeWalk walk(tile.keys());
  // No key that a query sees begins after its last candidate.
  while (const std::int64_t columns = walk.next(scratch.tile.chunk, scratch.tile.pieces, &num_pieces)) {
    add_masses(s, tile, scratch, walk.first(), columns, num_pieces, &held);
    offer_blocks(s, tile, scratch, &held, &next, num_blocks);
  }
  while (next < num_blocks) {
    add_zeros(std::max<std::int64_t>(0, s.step * (next + 1) - held.first - held.count), &held);
    offer_blocks(s, tile, scratch, &held, &next, num_blocks);
  }
}

template <typename Real>
void select(const Selection<Real>& s, const RangeTile& tile, const Scratch<Real>& scratch) {
  const std::int64_t topk = s.args.topk, queries = tile.end - tile.begin;
  std::int64_t num_blocks = 0;  // that some query has to rank
  for (std::int64_t i = 0; i < queries; ++i) {
    BlockRanking<Real>& ranking = scratch.rankings[i];
    ranking.candidates = block_candidates(s.args, tile.sequence.num_tokens, tile.sequence.position + tile.begin + i);
    ranking.budget = topk - ranking.candidates.forced();
    ranking.kept = 0;
    if (ranking.is_open(topk)) num_blocks = std::max(num_blocks, ranking.candidates.count);
  }
  if (num_blocks > 0) rank_blocks(s, tile, scratch, num_blocks);
  for (std::int64_t i = 0; i < queries; ++i) {
    const std::int64_t q_row = tile.sequence.q_begin + tile.begin + i;
    scratch.rankings[i].write(topk, s.args.block_indices + (q_row * s.problem.num_heads_k + tile.head) * topk);
  }
}

template <typename Real>
std::size_t selection_workspace(const BlockSelection& args) {
  Carver carver(nullptr);
  const Selection<Real> s = carve_selection<Real>(args, carver);
  return carver.used() + static_cast<std::size_t>(resolve_threads(args.num_threads)) * scratch_bytes(s);
}

template <typename Real>
void run_selection(const BlockSelection& args) {
  const int num_threads = resolve_threads(args.num_threads);
  Carver carver(args.workspace);
  const Selection<Real> s = carve_selection<Real>(args, carver);
  char* const scratch = carver.take<char>(0);
  fill_ranges(s.problem, s.ranges);
  fill_weights(s);
  pack_ranges<Real>(s.problem, s.ranges, args.k, s.k, {}, num_threads);
  const std::int64_t row_entries = s.problem.num_heads_k * args.topk;
  for_outside_rows(s.ranges.q_begin, s.ranges.batch, s.ranges.total_q, [&](std::int64_t q_row) {
    std::fill(args.block_indices + q_row * row_entries, args.block_indices + (q_row + 1) * row_entries, -1);
  });
  for_range_tiles(s.problem, s.ranges, num_threads, scratch, scratch_bytes(s),
                  [&](const RangeTile& tile, char* memory) {
                    Carver own(memory);
                    select(s, tile, Scratch<Real>::carve(s, own));
                  });
}

}  // namespace

std::size_t workspace_bytes(const BlockSelection& args) {
  return args.problem.dtype == Dtype::kFloat64 ? selection_workspace<double>(args) : selection_workspace<float>(args);
}

void select_blocks(const BlockSelection& args) {
  if (args.problem.dtype == Dtype::kFloat64) {
    run_selection<double>(args);
  } else {
    run_selection<float>(args);
  }
}

}  // namespace nsa::cpu
