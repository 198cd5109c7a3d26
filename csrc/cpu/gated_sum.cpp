// o = sum over branches c of g_c o_c, and its gradients; one row of one head at a time.
#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/gates.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"

namespace nsa::cpu {
namespace {

constexpr std::int64_t kChunk = 256;    // elements of a row at a time: three of them stay in the L1
constexpr std::int64_t kGrain = 65536;  // elements that are worth a thread's while
constexpr int kLanes = 16;              // partial sums, so that a dot product is vectors

// A piece of a row of `tensor` in the compute type.
template <typename Real>
void load_piece(const GatedSumProblem& p, const Tensor& tensor, RowIndex row, std::int64_t head, std::int64_t first,
                std::int64_t count, Real* piece) {
  const char* const from = static_cast<const char*>(address_of(tensor, p.dtype, row, head));
  kernels<Real>().load(p.dtype, from + first * bytes_of(p.dtype), count, piece);
}

template <typename Real>
void store_piece(const GatedSumProblem& p, const Tensor& tensor, RowIndex row, std::int64_t head, std::int64_t first,
                 std::int64_t count, const Real* piece) {
  char* const to = static_cast<char*>(address_of(tensor, p.dtype, row, head));
  kernels<Real>().store(p.dtype, piece, count, to + first * bytes_of(p.dtype));
}

template <typename Body>
void for_rows(const GatedSumProblem& p, int num_threads, const Body& body) {
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, p.num_heads * p.head_dim));
  parallel_for(resolve_threads(num_threads), p.batch * p.rows, grain, [&](int, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t head = 0; head < p.num_heads; ++head) body(RowIndex{row / p.rows, row % p.rows}, head);
    }
  });
}

template <typename Real>
void run_forward(const GatedSumForward& args) {
  const GatedSumProblem& p = args.problem;
  const Tensor* const branches[] = {&args.o_cmp, &args.o_slc, &args.o_win};
  for_rows(p, args.num_threads, [&](RowIndex row, std::int64_t head) {
    Real gates[3];
    for (int c = 0; c < 3; ++c) gates[c] = load_gate<Real>(args.gates, row, head, c);
    for (std::int64_t first = 0; first < p.head_dim; first += kChunk) {
      const std::int64_t count = std::min(kChunk, p.head_dim - first);
      Real sum[kChunk] = {}, piece[kChunk];
      for (int c = 0; c < 3; ++c) {
        load_piece(p, *branches[c], row, head, first, count, piece);
        // 0 where o_c is 0, whatever the gate of a dead row holds
        for (std::int64_t i = 0; i < count; ++i) sum[i] += piece[i] == 0 ? Real{0} : gates[c] * piece[i];
      }
      store_piece(p, args.o, row, head, first, count, sum);
    }
  });
}

// Sum of x y in an order that depends on the sizes alone; terms where x is 0 are 0, whatever y holds.
template <typename Real>
void add_products(const Real* x, const Real* y, std::int64_t count, Real (&lanes)[kLanes]) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] == 0 ? Real{0} : x[i + lane] * y[i + lane];
  }
  for (int lane = 0; i + lane < count; ++lane) lanes[lane] += x[i + lane] == 0 ? Real{0} : x[i + lane] * y[i + lane];
}

template <typename Real>
void run_backward(const GatedSumBackward& args) {
  const GatedSumProblem& p = args.problem;
  const Tensor* const branches[] = {&args.o_cmp, &args.o_slc, &args.o_win};
  for_rows(p, args.num_threads, [&](RowIndex row, std::int64_t head) {
    Real lanes[3][kLanes] = {};
    for (std::int64_t first = 0; first < p.head_dim; first += kChunk) {
      const std::int64_t count = std::min(kChunk, p.head_dim - first);
      Real dout[kChunk], piece[kChunk];
      load_piece(p, args.dout, row, head, first, count, dout);
      for (int c = 0; c < 3; ++c) {
        if (!branches[c]->data) continue;
        load_piece(p, *branches[c], row, head, first, count, piece);
        add_products(piece, dout, count, lanes[c]);
      }
    }
    for (int c = 0; c < 3; ++c) {
      if (!branches[c]->data) continue;
      Real sum = 0;
      for (const Real lane : lanes[c]) sum += lane;
      store_gate(args.dgates, row, head, c, sum);
    }
  });
}

}  // namespace

void gated_sum(const GatedSumForward& args) {
  if (args.problem.dtype == Dtype::kFloat64) {
    run_forward<double>(args);
  } else {
    run_forward<float>(args);
  }
}

void gated_sum(const GatedSumBackward& args) {
  if (args.problem.dtype == Dtype::kFloat64) {
    run_backward<double>(args);
  } else {
    run_backward<float>(args);
  }
}

}  // namespace nsa::cpu
