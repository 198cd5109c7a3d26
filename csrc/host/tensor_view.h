// One tensor of a call as the checks see it, and the rules that every tensor obeys.
#pragma once

#include "host/status.h"

namespace nsa {

inline constexpr std::int64_t kCudaAlignment = 16;  // bytes: one cp.async, and the unit of a TMA stride

enum class Access { kRead, kWritten };

// [batch, rows, heads, dim], packed: batch = 1. lse, dlse: dim = 1.
struct View {
  const char* name;
  const Tensor& tensor;
  std::int64_t batch, rows, heads, dim;
  std::int64_t element_bytes;
  std::int64_t alignment;  // bytes, of the data and of the strides
  Access access;
};

// Adds the reach of one dimension, (size - 1) * |stride| elements; false past 64 bits.
bool add_reach(std::int64_t size, std::int64_t stride, std::int64_t* reach);

Status check_view(const View& view);

// The gates of one branch.
Status check_gate(const char* name, const GateTensor& gate, std::int64_t batch, std::int64_t rows, std::int64_t heads,
                  Access access);

}  // namespace nsa
