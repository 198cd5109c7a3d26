// Elements of tensors to the compute type and back. As vector.h, for kernels_*.cpp alone.
#pragma once

#include <cstdint>

#include "cpu/vector.h"
#include "nsa_cuda/nsa.h"

namespace nsa::cpu {
namespace {

inline float from_bfloat16(std::uint16_t x) { return bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }

inline std::uint16_t to_bfloat16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// IEEE half: 1 sign, 5 exponent (bias 15), 10 mantissa bits. Float's bias is 112 more and its mantissa 13 bits longer.
inline float from_float16(std::uint16_t x) {
  const std::uint32_t magnitude = x & 0x7fffu;
  std::uint32_t bits = (magnitude << 13) + (112u << 23);
  bits += magnitude >= 0x7c00u ? 112u << 23 : 0u;  // inf, NaN
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  bits = magnitude < 0x0400u ? subnormal : bits;
  return bit_cast<float>(bits | (static_cast<std::uint32_t>(x & 0x8000u) << 16));
}

inline std::uint16_t to_float16(float x) {
  const std::uint32_t all = bit_cast<std::uint32_t>(x), magnitude = all & 0x7fffffffu;
  const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14: 0.5's last mantissa bit is worth 2^-24, half's smallest step, so the addition rounds to it.
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on: inf
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  return static_cast<std::uint16_t>(half | ((all >> 16) & 0x8000u));
}

inline void load_elements(Dtype dtype, const void* source, std::int64_t count, float* target) {
  const auto* const halves = static_cast<const std::uint16_t*>(source);
  if (dtype == Dtype::kFloat32) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = from_bfloat16(halves[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) target[i] = from_float16(halves[i]);
  }
}

inline void load_elements(Dtype, const void* source, std::int64_t count, double* target) {
  std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(double));
}

inline void store_elements(Dtype dtype, const float* source, std::int64_t count, void* target) {
  auto* const halves = static_cast<std::uint16_t*>(target);
  if (dtype == Dtype::kFloat32) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    for (std::int64_t i = 0; i < count; ++i) halves[i] = to_bfloat16(source[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) halves[i] = to_float16(source[i]);
  }
}

inline void store_elements(Dtype, const double* source, std::int64_t count, void* target) {
  std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(double));
}

}  // namespace
}  // namespace nsa::cpu
