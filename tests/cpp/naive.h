// Selected attention in double, straight from its definition: what the library's numbers are held against.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// Sizes of a call and its lists. Packed when cu_seqlens_q isn't empty: then batch rows lie one behind the other.
struct Case {
  std::string name;
  std::int64_t batch, seqlen_q, seqlen_k;  // packed: seqlen_* are the totals
  std::int64_t num_heads_q, num_heads_k;
  std::int64_t head_dim_qk, head_dim_v;
  std::int64_t block_size, num_indices;
  bool causal;
  std::vector<std::int32_t> cu_seqlens_q, cu_seqlens_k;

  bool packed() const { return !cu_seqlens_q.empty(); }
  std::int64_t rows_q() const { return packed() ? seqlen_q : batch * seqlen_q; }
  std::int64_t rows_k() const { return packed() ? seqlen_k : batch * seqlen_k; }
};

// Contiguous: q, dq [rows_q, Hq, Dk]; k, dk [rows_k, Hkv, Dk]; v, dv [rows_k, Hkv, Dv]; o, dout [rows_q, Hq, Dv];
// lse, dlse [rows_q, Hq]; indices [rows_q, Hkv, S].
struct Arrays {
  std::vector<double> q, k, v, dout, dlse;
  std::vector<std::int32_t> indices;
  std::vector<double> o, lse, dq, dk, dv;
};

// Fresh inputs; block ids include negative ones, ones past the end, and duplicates. Values are multiples of 1/8 in (-2,
// 2), exact in every dtype.
Arrays make_inputs(const Case& test, std::uint32_t seed);

// Fills o, lse, dq, dk, dv from the rest.
void compute_naive(const Case& test, double softmax_scale, Arrays& arrays);
