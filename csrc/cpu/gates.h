// One gate in the compute type, whatever its dtype.
#pragma once

#include "cpu/kernels.h"
#include "cpu/sequences.h"

namespace nsa::cpu {

inline char* address_of(const GateTensor& gates, RowIndex row, std::int64_t head, int branch) {
  return static_cast<char*>(gates.data) +
         (offset_of(gates, row, head) + branch * gates.branch_stride) * bytes_of(gates.dtype);
}

template <typename Real>
Real load_gate(const GateTensor& gates, RowIndex row, std::int64_t head, int branch) {
  const char* const from = address_of(gates, row, head, branch);
  if (gates.dtype == Dtype::kFloat64) return static_cast<Real>(*reinterpret_cast<const double*>(from));
  float value;
  kernels<float>().load(gates.dtype, from, 1, &value);
  return static_cast<Real>(value);
}

template <typename Real>
void store_gate(const GateTensor& gates, RowIndex row, std::int64_t head, int branch, Real value) {
  char* const to = address_of(gates, row, head, branch);
  if (gates.dtype == Dtype::kFloat64) {
    *reinterpret_cast<double*>(to) = static_cast<double>(value);
  } else {
    const auto rounded = static_cast<float>(value);
    kernels<float>().store(gates.dtype, &rounded, 1, to);
  }
}

// The gate of a backward's row; 1 without.
template <typename Real, typename Backward>
Real gate_of(const Backward& args, RowIndex row, std::int64_t head) {
  return args.gate.data ? load_gate<Real>(args.gate, row, head, 0) : Real{1};
}

}  // namespace nsa::cpu
