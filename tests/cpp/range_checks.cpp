// Range attention and block selection on the CPU, held against loops in double over one small sequence.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "run.h"

namespace {

constexpr std::int64_t kTokens = 90, kHeads = 4, kGroup = 2, kDim = 8;  // one kv head per kGroup heads
constexpr std::int64_t kWindow = 17, kSize = 8, kStride = 4;
constexpr std::int64_t kCompressed = (kTokens - kSize) / kStride + 1;
constexpr std::int64_t kBlock = 8, kTopk = 4;
const double kScale = 1 / std::sqrt(static_cast<double>(kDim));

struct Range {
  std::int64_t begin, end;
};

Range range_of(nsa::RangeMask mask, std::int64_t position) {
  if (mask == nsa::RangeMask::kWindow) return {std::max<std::int64_t>(0, position - kWindow + 1), position + 1};
  return {0, position < kSize - 1 ? 0 : (position - kSize + 1) / kStride + 1};
}

std::int64_t num_keys(nsa::RangeMask mask) { return mask == nsa::RangeMask::kWindow ? kTokens : kCompressed; }

// Values that differ, in (-1, 1).
std::vector<double> values(std::int64_t count, double seed) {
  std::vector<double> result(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < result.size(); ++i) result[i] = std::sin(seed + 1.7 * static_cast<double>(i));
  return result;
}

nsa::Tensor rows(std::vector<double>& data, std::int64_t heads, std::int64_t dim) {
  return {data.data(), 0, heads * dim, dim};
}

nsa::RangeAttentionProblem make_problem(nsa::RangeMask mask) {
  nsa::RangeAttentionProblem problem;
  problem.dtype = nsa::Dtype::kFloat64;
  problem.batch = 1;
  problem.seqlen_q = kTokens;
  problem.seqlen_k = num_keys(mask);
  problem.num_heads_q = kHeads;
  problem.num_heads_k = kHeads / kGroup;
  problem.head_dim_qk = problem.head_dim_v = kDim;
  problem.mask = mask;
  problem.window_size = kWindow;
  problem.kernel_size = kSize;
  problem.kernel_stride = kStride;
  problem.num_tokens = kTokens;
  problem.softmax_scale = kScale;
  return problem;
}

struct Data {
  std::vector<double> q = values(kTokens * kHeads * kDim, 0.3), k, v, dout = values(kTokens * kHeads * kDim, 0.7);
  std::vector<double> o = std::vector<double>(q.size()), lse = std::vector<double>(kTokens * kHeads);
  std::vector<double> dq = std::vector<double>(q.size()), dk, dv;

  explicit Data(std::int64_t keys)
      : k(values(keys * kHeads / kGroup * kDim, 0.1)), v(values(static_cast<std::int64_t>(k.size()), 0.9)) {}
};

double dot(const double* a, const double* b) {
  double sum = 0;
  for (std::int64_t i = 0; i < kDim; ++i) sum += a[i] * b[i];
  return sum;
}

// The probabilities of one row over its range.
std::vector<double> probabilities(const Data& data, const double* q, std::int64_t kv_head, Range range, double* lse) {
  std::vector<double> p;
  double sum = 0;
  for (std::int64_t key = range.begin; key < range.end; ++key) {
    p.push_back(std::exp(kScale * dot(q, &data.k[(key * kHeads / kGroup + kv_head) * kDim])));
    sum += p.back();
  }
  for (double& x : p) x /= sum;
  *lse = range.begin < range.end ? std::log(sum) : -std::numeric_limits<double>::infinity();
  return p;
}

void compute(nsa::RangeMask mask, Data& data) {
  for (std::int64_t row = 0; row < kTokens * kHeads; ++row) {
    const std::int64_t kv_head = row % kHeads / kGroup;
    const Range range = range_of(mask, row / kHeads);
    const double *q = &data.q[row * kDim], *dout = &data.dout[row * kDim];
    const std::vector<double> p = probabilities(data, q, kv_head, range, &data.lse[row]);
    double delta = 0;
    for (std::size_t i = 0; i < p.size(); ++i) {
      const std::int64_t at = ((range.begin + static_cast<std::int64_t>(i)) * kHeads / kGroup + kv_head) * kDim;
      delta += p[i] * dot(dout, &data.v[at]);
      for (std::int64_t d = 0; d < kDim; ++d) data.o[row * kDim + d] += p[i] * data.v[at + d];
    }
    for (std::size_t i = 0; i < p.size(); ++i) {
      const std::int64_t at = ((range.begin + static_cast<std::int64_t>(i)) * kHeads / kGroup + kv_head) * kDim;
      const double ds = kScale * p[i] * (dot(dout, &data.v[at]) - delta);
      for (std::int64_t d = 0; d < kDim; ++d) {
        data.dq[row * kDim + d] += ds * data.k[at + d];
        data.dk[at + d] += ds * q[d];
        data.dv[at + d] += p[i] * dout[d];
      }
    }
  }
}

void compare(const char* what, const std::vector<double>& found, const std::vector<double>& expected, Tally& tally) {
  double worst = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (found[i] != expected[i]) worst = std::max(worst, std::abs(found[i] - expected[i]));
    if (std::isnan(found[i])) worst = std::numeric_limits<double>::infinity();
  }
  tally.check(worst < 1e-12, "range attention: %s is off by %g", what, worst);
}

// Asks for the workspace and runs.
template <typename Arguments>
void call(nsa::Status (*query)(const Arguments&, std::size_t*), nsa::Status (*run)(const Arguments&), Arguments args,
          Tally& tally) {
  nsa::Status status = query(args, &args.workspace_bytes);
  std::vector<char> memory(args.workspace_bytes + 64);
  args.workspace = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
  if (status.ok()) status = run(args);
  tally.check(status.ok(), "range attention: %s", status.message);
}

void check_attention(nsa::RangeMask mask, Tally& tally) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Data data(num_keys(mask));
  nsa::RangeAttentionForward forward;
  forward.problem = make_problem(mask);
  std::vector<double> o(data.q.size(), nan), lse(data.lse.size(), nan);
  std::vector<double> dq(data.q.size(), nan), dk(data.k.size(), nan), dv(data.v.size(), nan);
  forward.q = rows(data.q, kHeads, kDim);
  forward.k = rows(data.k, kHeads / kGroup, kDim);
  forward.v = rows(data.v, kHeads / kGroup, kDim);
  forward.o = rows(o, kHeads, kDim);
  forward.lse = rows(lse, kHeads, 1);
  call(&nsa::range_attention_workspace, &nsa::range_attention, forward, tally);
  nsa::RangeAttentionBackward backward;
  backward.problem = forward.problem;
  backward.q = forward.q;
  backward.k = forward.k;
  backward.v = forward.v;
  backward.o = forward.o;
  backward.lse = forward.lse;
  backward.dout = rows(data.dout, kHeads, kDim);
  backward.dq = rows(dq, kHeads, kDim);
  backward.dk = rows(dk, kHeads / kGroup, kDim);
  backward.dv = rows(dv, kHeads / kGroup, kDim);
  call(&nsa::range_attention_workspace, &nsa::range_attention, backward, tally);
  data.dk.assign(data.k.size(), 0);
  data.dv.assign(data.v.size(), 0);
  compute(mask, data);
  compare("o", o, data.o, tally);
  compare("lse", lse, data.lse, tally);
  compare("dq", dq, data.dq, tally);
  compare("dk", dk, data.dk, tally);
  compare("dv", dv, data.dv, tally);
}

// The blocks of one row and kv head: block 0, its own and the one before, then the best of the others.
std::vector<std::int32_t> choose(const Data& data, std::int64_t token, std::int64_t kv_head) {
  const Range range = range_of(nsa::RangeMask::kCompressed, token);
  const std::int64_t own = token / kBlock;
  std::vector<double> score(static_cast<std::size_t>(own) + 1);
  for (std::int64_t head = kv_head * kGroup; head < (kv_head + 1) * kGroup; ++head) {
    double lse;
    const std::vector<double> p = probabilities(data, &data.q[(token * kHeads + head) * kDim], kv_head, range, &lse);
    for (std::int64_t i = 0; i < range.end; ++i) {
      for (std::int64_t j = 0; j <= own; ++j) {  // units of d tokens that key and block share
        const std::int64_t shared = std::min(i * kStride + kSize, (j + 1) * kBlock) - std::max(i * kStride, j * kBlock);
        if (shared > 0) score[j] += p[i] * static_cast<double>(shared) / kStride;
      }
    }
  }
  std::vector<std::int32_t> ids;
  for (std::int32_t j = 0; j <= own; ++j) ids.push_back(j);
  const auto rank = [&](std::int32_t j) { return j == 0 || j >= own - 1 ? 1e9 : score[j]; };
  std::stable_sort(ids.begin(), ids.end(), [&](std::int32_t a, std::int32_t b) { return rank(a) > rank(b); });
  ids.resize(std::min<std::size_t>(ids.size(), kTopk));
  std::sort(ids.begin(), ids.end());
  ids.resize(kTopk, -1);
  return ids;
}

void check_selection(Tally& tally) {
  Data data(kCompressed);
  data.dk.resize(data.k.size());
  data.dv.resize(data.v.size());
  compute(nsa::RangeMask::kCompressed, data);
  nsa::BlockSelection args;
  args.problem = make_problem(nsa::RangeMask::kCompressed);
  args.block_size = kBlock;
  args.topk = kTopk;
  args.q = rows(data.q, kHeads, kDim);
  args.k = rows(data.k, kHeads / kGroup, kDim);
  args.lse = rows(data.lse, kHeads, 1);
  std::vector<std::int32_t> found(kTokens * kHeads / kGroup * kTopk, -7);
  args.block_indices = found.data();
  call(&nsa::block_selection_workspace, &nsa::select_blocks, args, tally);
  int wrong = 0;
  for (std::int64_t row = 0; row < kTokens * kHeads / kGroup; ++row) {
    const std::vector<std::int32_t> expected = choose(data, row / (kHeads / kGroup), row % (kHeads / kGroup));
    wrong += !std::equal(expected.begin(), expected.end(), found.begin() + row * kTopk);
  }
  tally.check(wrong == 0, "block selection: %d rows of %d are wrong", wrong, static_cast<int>(kTokens * 2));
  args.topk = 2;
  std::size_t bytes;
  const nsa::Status status = nsa::block_selection_workspace(args, &bytes);
  tally.check(status.code == nsa::StatusCode::kInvalidArgument && std::strstr(status.message, "topk is 2"),
              "block selection: forced blocks beyond topk: '%s'", status.message);
}

}  // namespace

void check_ranges(Tally& tally) {
  check_attention(nsa::RangeMask::kWindow, tally);
  check_attention(nsa::RangeMask::kCompressed, tally);
  check_selection(tally);
}
