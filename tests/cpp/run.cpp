#include "run.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>

namespace {

using Bytes = std::vector<unsigned char>;

std::size_t size_of(nsa::Dtype dtype) {
  return dtype == nsa::Dtype::kFloat64 ? 8 : dtype == nsa::Dtype::kFloat32 ? 4 : 2;
}

// Inputs are multiples of 1/8 below 2, so cutting the mantissa loses nothing.
std::uint16_t to_half(double value, nsa::Dtype dtype) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
  if (dtype == nsa::Dtype::kBFloat16) return static_cast<std::uint16_t>(bits >> 16);
  if (std::isnan(value)) return 0x7e00;
  if (value == 0) return 0;
  const std::uint32_t exponent = ((bits >> 23) & 0xff) - 127 + 15;
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3ff));
}

double from_half(std::uint16_t bits, nsa::Dtype dtype) {
  if (dtype == nsa::Dtype::kBFloat16) return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

Bytes encode(const std::vector<double>& values, nsa::Dtype dtype) {
  Bytes bytes(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    unsigned char* to = bytes.data() + i * size_of(dtype);
    const float single = static_cast<float>(values[i]);
    const std::uint16_t half = to_half(values[i], dtype);
    if (dtype == nsa::Dtype::kFloat64)
      std::memcpy(to, &values[i], 8);
    else if (dtype == nsa::Dtype::kFloat32)
      std::memcpy(to, &single, 4);
    else
      std::memcpy(to, &half, 2);
  }
  return bytes;
}

std::vector<double> decode(const Bytes& bytes, nsa::Dtype dtype) {
  std::vector<double> values(bytes.size() / size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const unsigned char* from = bytes.data() + i * size_of(dtype);
    float single;
    std::uint16_t half;
    std::memcpy(&single, from, dtype == nsa::Dtype::kFloat32 ? 4 : 0);
    std::memcpy(&half, from, dtype == nsa::Dtype::kFloat64 || dtype == nsa::Dtype::kFloat32 ? 0 : 2);
    if (dtype == nsa::Dtype::kFloat64)
      std::memcpy(&values[i], from, 8);
    else
      values[i] = dtype == nsa::Dtype::kFloat32 ? single : from_half(half, dtype);
  }
  return values;
}

// A tensor [rows, heads, dim] in the library's memory and how to read it back.
struct Buffer {
  nsa::Tensor tensor;
  std::size_t count;
  nsa::Dtype dtype;
};

class Call {
 public:
  Call(const Case& test, nsa::Dtype dtype, Memory& memory, const Arrays& arrays)
      : test_(test), dtype_(dtype), memory_(memory), arrays_(arrays) {}

  Buffer input(const std::vector<double>& values, std::int64_t length, std::int64_t heads, std::int64_t dim,
               nsa::Dtype dtype) {
    const Bytes bytes = encode(values, dtype);
    Buffer buffer{{memory_.allocate(bytes.size()), length * heads * dim, heads * dim, dim}, values.size(), dtype};
    memory_.copy_in(buffer.tensor.data, bytes.data(), bytes.size());
    return buffer;
  }

  Buffer output(std::size_t count, std::int64_t length, std::int64_t heads, std::int64_t dim, nsa::Dtype dtype) {
    return input(std::vector<double>(count, std::numeric_limits<double>::quiet_NaN()), length, heads, dim, dtype);
  }

  const void* integers(const std::vector<std::int32_t>& values) {
    void* data = memory_.allocate(values.size() * sizeof(std::int32_t));
    memory_.copy_in(data, values.data(), values.size() * sizeof(std::int32_t));
    return data;
  }

  Bytes read(const Buffer& buffer) {
    Bytes bytes(buffer.count * size_of(buffer.dtype));
    memory_.copy_out(bytes.data(), buffer.tensor.data, bytes.size());
    return bytes;
  }

  nsa::SelectedAttentionProblem problem(double softmax_scale) {
    nsa::SelectedAttentionProblem problem;
    problem.device = memory_.device();
    problem.dtype = dtype_;
    problem.batch = test_.batch;
    problem.seqlen_q = test_.seqlen_q;
    problem.seqlen_k = test_.seqlen_k;
    problem.num_heads_q = test_.num_heads_q;
    problem.num_heads_k = test_.num_heads_k;
    problem.head_dim_qk = test_.head_dim_qk;
    problem.head_dim_v = test_.head_dim_v;
    problem.block_size = test_.block_size;
    problem.num_indices = test_.num_indices;
    problem.causal = test_.causal;
    problem.softmax_scale = softmax_scale;
    if (test_.packed()) {
      problem.cu_seqlens_q = static_cast<const std::int32_t*>(integers(test_.cu_seqlens_q));
      problem.cu_seqlens_k = static_cast<const std::int32_t*>(integers(test_.cu_seqlens_k));
    }
    const std::int64_t width = test_.num_heads_k * test_.num_indices;
    problem.block_indices = {
        integers(arrays_.indices), nsa::IndexType::kInt32, test_.seqlen_q * width, width, test_.num_indices, 1};
    return problem;
  }

 private:
  const Case& test_;
  nsa::Dtype dtype_;
  Memory& memory_;
  const Arrays& arrays_;
};

// Asks for the workspace, runs, and reports a refusal as a failed check.
template <typename Arguments>
bool run(Arguments& args, const Case& test, Memory& memory, Tally& tally) {
  nsa::Status status = nsa::selected_attention_workspace(args, &args.workspace_bytes);
  if (status.ok()) {
    args.workspace = memory.allocate(args.workspace_bytes);
    status = nsa::selected_attention(args);
  }
  tally.check(status.ok(), "%s: %s", test.name.c_str(), status.message);
  return status.ok();
}

// || out - reference || / || reference ||, infinities at the same places.
void compare(const Case& test, const char* what, const std::vector<double>& out, const std::vector<double>& reference,
             double tolerance, Tally& tally) {
  double error = 0, norm = 0;
  bool infinities_agree = out.size() == reference.size();
  for (std::size_t i = 0; i < reference.size() && infinities_agree; ++i) {
    if (std::isinf(reference[i]) || std::isinf(out[i])) {
      infinities_agree = out[i] == reference[i];
    } else {
      error += (out[i] - reference[i]) * (out[i] - reference[i]);
      norm += reference[i] * reference[i];
    }
  }
  tally.check(infinities_agree, "%s: %s has infinities where the reference has none, or none where it has",
              test.name.c_str(), what);
  // Written so that NaN fails.
  tally.check(std::sqrt(error) <= tolerance * std::sqrt(norm), "%s: error of %s is %.3g, allowed is %.3g",
              test.name.c_str(), what, std::sqrt(error / norm), tolerance);
}

// Rounding of the dtype, times what a softmax and sums over a few hundred keys add.
double tolerance_of(nsa::Dtype dtype) {
  switch (dtype) {
    case nsa::Dtype::kFloat64:
      return 1e-13;
    case nsa::Dtype::kFloat32:
      return 2e-6;
    case nsa::Dtype::kBFloat16:
      return 8e-3;
    case nsa::Dtype::kFloat16:
      return 1e-3;
  }
  return 0;
}

}  // namespace

void Tally::check(bool ok, const char* format, ...) {
  ++checks;
  if (ok) return;
  ++failures;
  std::va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

void run_case(const Case& test, nsa::Dtype dtype, Memory& memory, Tally& tally) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(test.head_dim_qk));
  const double tolerance = tolerance_of(dtype);
  const nsa::Dtype lse_dtype = dtype == nsa::Dtype::kFloat64 ? dtype : nsa::Dtype::kFloat32;
  const std::int64_t hq = test.num_heads_q, hk = test.num_heads_k, dk = test.head_dim_qk, dv = test.head_dim_v;
  Arrays arrays = make_inputs(test, 20250216);
  compute_naive(test, scale, arrays);

  Call call(test, dtype, memory, arrays);
  nsa::SelectedAttentionForward forward;
  forward.problem = call.problem(scale);
  forward.q = call.input(arrays.q, test.seqlen_q, hq, dk, dtype).tensor;
  forward.k = call.input(arrays.k, test.seqlen_k, hk, dk, dtype).tensor;
  forward.v = call.input(arrays.v, test.seqlen_k, hk, dv, dtype).tensor;
  const Buffer o = call.output(arrays.o.size(), test.seqlen_q, hq, dv, dtype);
  const Buffer lse = call.output(arrays.lse.size(), test.seqlen_q, hq, 1, lse_dtype);
  forward.o = o.tensor;
  forward.lse = lse.tensor;
  if (!run(forward, test, memory, tally)) return;
  compare(test, "o", decode(call.read(o), dtype), arrays.o, tolerance, tally);
  compare(test, "lse", decode(call.read(lse), lse_dtype), arrays.lse, std::min(tolerance, 2e-6), tally);

  nsa::SelectedAttentionBackward backward;
  backward.problem = forward.problem;
  backward.q = forward.q;
  backward.k = forward.k;
  backward.v = forward.v;
  backward.o = forward.o;
  backward.lse = forward.lse;
  backward.dout = call.input(arrays.dout, test.seqlen_q, hq, dv, dtype).tensor;
  backward.dlse = call.input(arrays.dlse, test.seqlen_q, hq, 1, lse_dtype).tensor;
  Bytes first[3];
  for (int repeat = 0; repeat < 2; ++repeat) {
    const Buffer gradients[] = {call.output(arrays.dq.size(), test.seqlen_q, hq, dk, dtype),
                                call.output(arrays.dk.size(), test.seqlen_k, hk, dk, dtype),
                                call.output(arrays.dv.size(), test.seqlen_k, hk, dv, dtype)};
    backward.dq = gradients[0].tensor;
    backward.dk = gradients[1].tensor;
    backward.dv = gradients[2].tensor;
    backward.num_threads = repeat + 1;
    if (!run(backward, test, memory, tally)) return;
    const char* const names[] = {"dq", "dk", "dv"};
    const std::vector<double>* const references[] = {&arrays.dq, &arrays.dk, &arrays.dv};
    for (int i = 0; i < 3; ++i) {
      const Bytes bytes = call.read(gradients[i]);
      compare(test, names[i], decode(bytes, dtype), *references[i], tolerance, tally);
      if (repeat == 0) first[i] = bytes;
      tally.check(bytes == first[i], "%s: %s differs between two runs", test.name.c_str(), names[i]);
    }
  }
}

std::vector<Case> make_cases(std::int64_t dk, std::int64_t dv) {
  return {
      {"batched, causal", 2, 200, 200, 8, 2, dk, dv, 32, 5, true, {}, {}},
      {"batched, not causal, ragged", 2, 37, 101, 6, 3, dk, dv, 16, 4, false, {}, {}},
      {"chunked prefill, G = 16", 1, 65, 300, 16, 1, dk, dv, 64, 3, true, {}, {}},
      {"more queries than keys: dead rows", 1, 90, 40, 4, 4, dk, dv, 16, 3, true, {}, {}},
      {"packed, an empty sequence, rows past the end",
       3,
       140,
       150,
       4,
       2,
       dk,
       dv,
       32,
       3,
       true,
       {0, 70, 70, 129},
       {0, 70, 75, 145}},
      {"empty lists", 1, 20, 64, 2, 1, dk, dv, 32, 0, true, {}, {}},
      {"no keys", 2, 20, 0, 2, 1, dk, dv, 32, 2, true, {}, {}},
      {"no queries", 2, 0, 64, 2, 1, dk, dv, 32, 2, true, {}, {}},
  };
}
