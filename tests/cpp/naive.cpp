#include "naive.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>

namespace {

double dot(const double* a, const double* b, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(double* to, const double* from, double factor, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

struct Sequence {
  std::int64_t q_begin, q_len, k_begin, k_len;
};

std::vector<Sequence> sequences_of(const Case& test) {
  std::vector<Sequence> sequences;
  for (std::int64_t b = 0; b < test.batch; ++b) {
    if (test.packed()) {
      sequences.push_back({test.cu_seqlens_q[b], test.cu_seqlens_q[b + 1] - test.cu_seqlens_q[b], test.cu_seqlens_k[b],
                           test.cu_seqlens_k[b + 1] - test.cu_seqlens_k[b]});
    } else {
      sequences.push_back({b * test.seqlen_q, test.seqlen_q, b * test.seqlen_k, test.seqlen_k});
    }
  }
  return sequences;
}

// Keys of the sequence that query t sees through its list.
std::set<std::int64_t> visible_keys(const Case& test, const Sequence& sequence, std::int64_t t,
                                    const std::int32_t* list) {
  const std::int64_t position = t + sequence.k_len - sequence.q_len;
  std::set<std::int64_t> keys;
  for (std::int64_t s = 0; s < test.num_indices; ++s) {
    if (list[s] < 0) continue;
    const std::int64_t begin = list[s] * test.block_size;
    for (std::int64_t key = begin; key < std::min(begin + test.block_size, sequence.k_len); ++key) {
      if (!test.causal || key <= position) keys.insert(key);
    }
  }
  return keys;
}

void compute_row(const Case& test, double scale, std::int64_t row, std::int64_t head, std::int64_t k_begin,
                 const std::set<std::int64_t>& keys, Arrays& a) {
  const std::int64_t kv_head = head / (test.num_heads_q / test.num_heads_k);
  const std::int64_t dk = test.head_dim_qk, dv = test.head_dim_v, row_head = row * test.num_heads_q + head;
  double* lse = &a.lse[row_head];
  *lse = -std::numeric_limits<double>::infinity();
  if (keys.empty()) return;
  std::vector<double> probability;
  std::vector<std::int64_t> rows_k;
  for (const std::int64_t key : keys) {
    rows_k.push_back((k_begin + key) * test.num_heads_k + kv_head);
    probability.push_back(scale * dot(&a.q[row_head * dk], &a.k[rows_k.back() * dk], dk));
  }
  const double largest = *std::max_element(probability.begin(), probability.end());
  double sum = 0;
  for (const double score : probability) sum += std::exp(score - largest);
  *lse = largest + std::log(sum);
  double delta = -a.dlse[row_head];
  for (std::size_t i = 0; i < keys.size(); ++i) {
    probability[i] = std::exp(probability[i] - *lse);
    add_scaled(&a.o[row_head * dv], &a.v[rows_k[i] * dv], probability[i], dv);
    delta += probability[i] * dot(&a.dout[row_head * dv], &a.v[rows_k[i] * dv], dv);
  }
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const double dp = dot(&a.dout[row_head * dv], &a.v[rows_k[i] * dv], dv);
    const double ds = scale * probability[i] * (dp - delta);
    add_scaled(&a.dv[rows_k[i] * dv], &a.dout[row_head * dv], probability[i], dv);
    add_scaled(&a.dq[row_head * dk], &a.k[rows_k[i] * dk], ds, dk);
    add_scaled(&a.dk[rows_k[i] * dk], &a.q[row_head * dk], ds, dk);
  }
}

}  // namespace

Arrays make_inputs(const Case& test, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> eighths(-15, 15);
  const auto fill = [&](std::vector<double>& values, std::int64_t count) {
    values.resize(static_cast<std::size_t>(count));
    for (double& value : values) value = eighths(generator) / 8.0;
  };
  Arrays arrays;
  fill(arrays.q, test.rows_q() * test.num_heads_q * test.head_dim_qk);
  fill(arrays.k, test.rows_k() * test.num_heads_k * test.head_dim_qk);
  fill(arrays.v, test.rows_k() * test.num_heads_k * test.head_dim_v);
  fill(arrays.dout, test.rows_q() * test.num_heads_q * test.head_dim_v);
  fill(arrays.dlse, test.rows_q() * test.num_heads_q);
  const int num_blocks = static_cast<int>((test.seqlen_k + test.block_size - 1) / test.block_size);
  std::uniform_int_distribution<int> block(-2, num_blocks + 1);
  arrays.indices.resize(static_cast<std::size_t>(test.rows_q() * test.num_heads_k * test.num_indices));
  for (std::int32_t& index : arrays.indices) index = block(generator);
  return arrays;
}

void compute_naive(const Case& test, double softmax_scale, Arrays& arrays) {
  arrays.o.assign(arrays.dout.size(), 0.0);
  arrays.lse.assign(arrays.dlse.size(), -std::numeric_limits<double>::infinity());
  arrays.dq.assign(arrays.q.size(), 0.0);
  arrays.dk.assign(arrays.k.size(), 0.0);
  arrays.dv.assign(arrays.v.size(), 0.0);
  for (const Sequence& sequence : sequences_of(test)) {
    for (std::int64_t t = 0; t < sequence.q_len; ++t) {
      const std::int64_t row = sequence.q_begin + t;
      for (std::int64_t head = 0; head < test.num_heads_q; ++head) {
        const std::int64_t kv_head = head / (test.num_heads_q / test.num_heads_k);
        const std::int32_t* list = &arrays.indices[(row * test.num_heads_k + kv_head) * test.num_indices];
        compute_row(test, softmax_scale, row, head, sequence.k_begin, visible_keys(test, sequence, t, list), arrays);
      }
    }
  }
}
