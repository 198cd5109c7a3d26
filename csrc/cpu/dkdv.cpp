// dK = dS^T Q and dV = P^T dO, one tile of keys at a time, over the queries that chose its block.
#include <algorithm>

#include "cpu/backward.h"
#include "cpu/parallel.h"
#include "cpu/query_scratch.h"

namespace nsa::cpu {
namespace {

// Keys whose sums one piece of work keeps, and query rows per product: four times the depth of one query at G = 16, so
// that reading and writing the sums [64, D] costs little beside the products.
constexpr std::int64_t kTileKeys = kPanelKeys;
constexpr std::int64_t kTileRows = 64;

template <typename Real>
struct KeyTileScratch {
  std::int64_t q_row = 0, o_row = 0, score_row = 0;  // row strides
  Real* q = nullptr;                                 // [rows, Dk]
  Real* d_out = nullptr;                             // [rows, Dv]
  Real* scores = nullptr;                            // [rows, keys] S, then P
  Real* d_scores = nullptr;                          // [rows, keys] dP, then dS
  Real* lse = nullptr;                               // [rows]
  Real* delta = nullptr;                             // [rows]
  Real* gate = nullptr;                              // [rows]
  std::int64_t* visible = nullptr;                   // [rows] keys of the tile that the row sees
  Real* dk = nullptr;                                // [keys, Dk]
  Real* dv = nullptr;                                // [keys, Dv]

  static KeyTileScratch carve(const SelectedAttentionProblem& problem, Carver& carver) {
    const std::int64_t rows = std::max(kTileRows, problem.num_heads_q / problem.num_heads_k);
    KeyTileScratch s;
    s.q_row = padded<Real>(problem.head_dim_qk);
    s.o_row = padded<Real>(problem.head_dim_v);
    s.score_row = kTileKeys + padded<Real>(1);
    s.q = carver.take<Real>(rows * s.q_row);
    s.d_out = carver.take<Real>(rows * s.o_row);
    s.scores = carver.take<Real>(rows * s.score_row);
    s.d_scores = carver.take<Real>(rows * s.score_row);
    s.lse = carver.take<Real>(rows);
    s.delta = carver.take<Real>(rows);
    s.gate = carver.take<Real>(rows);
    s.visible = carver.take<std::int64_t>(rows);
    s.dk = carver.take<Real>(kTileKeys * s.q_row);
    s.dv = carver.take<Real>(kTileKeys * s.o_row);
    return s;
  }
};

// A tile of keys of one list, and the queries that a piece of work sums over.
struct KeyTile {
  std::int64_t head = 0;                                // kv head
  KeyRange keys;                                        // k rows, at most kTileKeys
  const std::int64_t *begin = nullptr, *end = nullptr;  // q rows
};

// Loads the queries from *next on that see a key of the tile, up to the scratch's size; returns rows = queries * G.
template <typename Real>
std::int64_t load_queries(const Backward<Real>& b, const KeyTile& tile, const std::int64_t** next,
                          const KeyTileScratch<Real>& s) {
  const Kernels<Real>& kernel = kernels<Real>();
  const SelectedAttentionProblem& p = b.problem;
  const std::int64_t group = b.group();
  const std::int64_t capacity = std::max(kTileRows, group);
  std::int64_t rows = 0;
  for (; *next != tile.end && rows + group <= capacity; ++*next) {
    const std::int64_t q_row = **next;
    const std::int64_t seen_end = place_query(p, b.sequences, q_row).keys.end;
    if (seen_end <= tile.keys.begin) continue;
    const RowIndex index = index_of_q(p, q_row);
    for (std::int64_t g = 0; g < group; ++g, ++rows) {
      const std::int64_t head_q = tile.head * group + g;
      kernel.load(p.dtype, address_of(b.args.q, p.dtype, index, head_q), p.head_dim_qk, s.q + rows * s.q_row);
      kernel.load(p.dtype, address_of(b.args.dout, p.dtype, index, head_q), p.head_dim_v, s.d_out + rows * s.o_row);
      s.lse[rows] = b.lse(index, head_q);
      s.delta[rows] = b.delta[q_row * p.num_heads_q + head_q];
      s.gate[rows] = gate_of<Real>(b.args, index, head_q);
      s.visible[rows] = std::min(seen_end, tile.keys.end) - tile.keys.begin;
    }
  }
  return rows;
}

// dk [keys, Dk] and dv [keys, Dv], those that are wanted, summed over the tile's queries.
template <typename Real>
void sum_over_queries(const Backward<Real>& b, const KeyTile& tile, const KeyTileScratch<Real>& s, Real* dk, Real* dv) {
  const Kernels<Real>& kernel = kernels<Real>();
  const SelectedAttentionProblem& p = b.problem;
  const bool need_dk = b.args.dk.data != nullptr, need_dv = b.args.dv.data != nullptr;
  const std::int64_t keys = tile.keys.end - tile.keys.begin;
  std::fill(dk, dk + keys * s.q_row, Real{0});
  std::fill(dv, dv + keys * s.o_row, Real{0});

  const std::int64_t in_first_panel = std::min(keys, kPanelKeys - tile.keys.begin % kPanelKeys);
  const KeyPiece pieces[2] = {{tile.keys.begin, in_first_panel, 0},
                              {tile.keys.begin + in_first_panel, keys - in_first_panel, in_first_panel}};
  const std::int64_t num_pieces = in_first_panel < keys ? 2 : 1;
  const std::int64_t* next = tile.begin;
  while (const std::int64_t rows = load_queries(b, tile, &next, s)) {
    multiply_by_columns(kernel, rows, s.q, s.q_row, b.k, tile.head, pieces, num_pieces, s.scores, s.score_row);
    if (need_dk) {
      multiply_by_columns(kernel, rows, s.d_out, s.o_row, b.v, tile.head, pieces, num_pieces, s.d_scores, s.score_row);
    }
    kernel.score_gradients({.rows = rows,
                            .columns = keys,
                            .scale = static_cast<Real>(p.softmax_scale),
                            .s = s.scores,
                            .dp = need_dk ? s.d_scores : nullptr,
                            .row_stride = s.score_row,
                            .lse = s.lse,
                            .delta = s.delta,
                            .gate = s.gate,
                            .end = s.visible});
    // Transposed: a row of the product is a column of the scores.
    Product<Real> product{.rows = keys, .depth = rows, .a_row = 1, .a_depth = s.score_row, .accumulate = true};
    if (need_dv) {
      product.columns = p.head_dim_v;
      product.a = s.scores;
      product.b = s.d_out;
      product.c = dv;
      product.b_depth = product.c_row = s.o_row;
      kernel.multiply(product);
    }
    if (need_dk) {
      product.columns = p.head_dim_qk;
      product.a = s.d_scores;
      product.b = s.q;
      product.c = dk;
      product.b_depth = product.c_row = s.q_row;
      kernel.multiply(product);
    }
  }
}

template <typename Real>
void store_rows(const Backward<Real>& b, const Tensor& tensor, std::int64_t head, KeyRange keys, const Real* rows,
                std::int64_t row_stride, std::int64_t dim) {
  if (tensor.data == nullptr) return;
  const Dtype dtype = b.problem.dtype;
  for (std::int64_t k_row = keys.begin; k_row < keys.end; ++k_row, rows += row_stride) {
    kernels<Real>().store(dtype, rows, dim, address_of(tensor, dtype, index_of_k(b.problem, k_row), head));
  }
}

template <typename Real>
void store_tile(const Backward<Real>& b, std::int64_t head, KeyRange keys, const Real* dk, const Real* dv) {
  const SelectedAttentionProblem& p = b.problem;
  store_rows(b, b.args.dk, head, keys, dk, padded<Real>(p.head_dim_qk), p.head_dim_qk);
  store_rows(b, b.args.dv, head, keys, dv, padded<Real>(p.head_dim_v), p.head_dim_v);
}

// Where the partial sums of one segment of a split list stand: dk [l', Dk], then dv [l', Dv], rows padded.
template <typename Real>
struct Partial {
  Real* dk;
  Real* dv;
};
template <typename Real>
Partial<Real> partial_of(const Backward<Real>& b, std::int64_t split_segment) {
  const std::int64_t q_row = padded<Real>(b.problem.head_dim_qk), o_row = padded<Real>(b.problem.head_dim_v);
  Real* const dk = b.partial + split_segment * b.keys_per_split * (q_row + o_row);
  return {dk, dk + b.keys_per_split * q_row};
}

// One segment of one list for one tile of its block's keys.
template <typename Real>
void run_segment(const Backward<Real>& b, std::int64_t list, std::int64_t segment, std::int64_t first_key,
                 const KeyTileScratch<Real>& s) {
  const InvertedIndex& index = b.index;
  const KeyRange block = keys_of_block(b.problem, b.sequences, list % index.num_blocks);
  const std::int64_t begin = block.begin + first_key;
  if (begin >= block.end) return;
  KeyTile tile;
  tile.head = list / index.num_blocks;
  tile.keys = {begin, std::min(begin + kTileKeys, block.end)};
  const std::int64_t first_row = index.list_begin[list] + segment * index.segment;
  tile.begin = index.rows + first_row;
  tile.end = index.rows + std::min(first_row + index.segment, index.list_begin[list + 1]);
  if (index.is_split(list)) {
    const Partial<Real> partial = partial_of(b, index.split_begin[list] + segment);
    sum_over_queries(b, tile, s, partial.dk + first_key * s.q_row, partial.dv + first_key * s.o_row);
  } else {
    sum_over_queries(b, tile, s, s.dk, s.dv);
    store_tile(b, tile.head, tile.keys, s.dk, s.dv);
  }
}

// Adds up the partial sums of a split list, first segment first.
template <typename Real>
void add_segments(const Backward<Real>& b, std::int64_t list) {
  const InvertedIndex& index = b.index;
  const KeyRange keys = keys_of_block(b.problem, b.sequences, list % index.num_blocks);
  const std::int64_t count = keys.end - keys.begin;
  const std::int64_t dk_size = count * padded<Real>(b.problem.head_dim_qk);
  const std::int64_t dv_size = count * padded<Real>(b.problem.head_dim_v);
  const Partial<Real> sum = partial_of(b, index.split_begin[list]);
  for (std::int64_t i = index.split_begin[list] + 1; i < index.split_begin[list + 1]; ++i) {
    const Partial<Real> part = partial_of(b, i);
    for (std::int64_t j = 0; j < dk_size; ++j) sum.dk[j] += part.dk[j];
    for (std::int64_t j = 0; j < dv_size; ++j) sum.dv[j] += part.dv[j];
  }
  store_tile(b, list / index.num_blocks, keys, sum.dk, sum.dv);
}

// Keys outside every sequence get zeros.
template <typename Real>
void clear_outside(const Backward<Real>& b, const KeyTileScratch<Real>& s) {
  const SelectedAttentionProblem& p = b.problem;
  std::fill(s.dk, s.dk + s.q_row, Real{0});
  std::fill(s.dv, s.dv + s.o_row, Real{0});
  const std::int64_t first = b.sequences.k_begin[0], last = b.sequences.k_begin[b.sequences.batch];
  for (const KeyRange outside : {KeyRange{0, first}, KeyRange{last, b.sequences.total_k}}) {
    for (std::int64_t head = 0; head < p.num_heads_k; ++head) {
      store_rows(b, b.args.dk, head, outside, s.dk, 0, p.head_dim_qk);
      store_rows(b, b.args.dv, head, outside, s.dv, 0, p.head_dim_v);
    }
  }
}

}  // namespace

template <typename Real>
std::size_t dkdv_scratch_bytes(const SelectedAttentionProblem& problem) {
  Carver carver(nullptr);
  KeyTileScratch<Real>::carve(problem, carver);
  return carver.used();
}

template <typename Real>
void compute_dkdv(const Backward<Real>& b, char* scratch) {
  const std::size_t thread_bytes = dkdv_scratch_bytes<Real>(b.problem);
  const InvertedIndex& index = b.index;
  Carver first_threads(scratch);
  clear_outside(b, KeyTileScratch<Real>::carve(b.problem, first_threads));
  const std::int64_t longest_block = std::min(b.problem.block_size, b.problem.seqlen_k);
  const std::int64_t tiles = (longest_block + kTileKeys - 1) / kTileKeys;
  const std::int64_t num_segments = index.num_lists == 0 ? 0 : index.segment_begin[index.num_lists];
  parallel_for(b.num_threads, num_segments * tiles, 1, [&](int thread, std::int64_t item, std::int64_t) {
    Carver own(scratch + static_cast<std::size_t>(thread) * thread_bytes);
    const auto s = KeyTileScratch<Real>::carve(b.problem, own);
    const std::int64_t segment = item / tiles;
    const std::int64_t* const first = index.segment_begin;
    const std::int64_t list = std::upper_bound(first, first + index.num_lists + 1, segment) - first - 1;
    run_segment(b, list, segment - first[list], item % tiles * kTileKeys, s);
  });
  if (index.num_lists == 0 || index.split_begin[index.num_lists] == 0) return;
  parallel_for(b.num_threads, index.num_lists, 1, [&](int, std::int64_t list, std::int64_t) {
    if (index.is_split(list)) add_segments(b, list);
  });
}

template std::size_t dkdv_scratch_bytes<float>(const SelectedAttentionProblem&);
template std::size_t dkdv_scratch_bytes<double>(const SelectedAttentionProblem&);
template void compute_dkdv(const Backward<float>&, char*);
template void compute_dkdv(const Backward<double>&, char*);

}  // namespace nsa::cpu
