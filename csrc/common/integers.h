// 64-bit sizes of a call as what kernels count in.
#pragma once

#include <climits>
#include <cstdint>

namespace nsa::cuda {

inline constexpr int64_t kFar = int64_t{1} << 40;  // beyond every length, so that sums can't overflow

constexpr int64_t clamp_far(int64_t x) { return x < -kFar ? -kFar : x > kFar ? kFar : x; }
constexpr int clamp_int(int64_t x) { return static_cast<int>(x < INT_MAX ? x : INT_MAX); }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace nsa::cuda
