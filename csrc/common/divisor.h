// A divisor known to the host: n / d takes a device three instructions and n % d four, where a division by a number in
// a register is a chain of 30, about 200 cycles. At the change of tiles, which no product hides, a warp divides ten
// times.
#pragma once

#include <bit>
#include <climits>
#include <concepts>
#include <cstdint>
#include <initializer_list>

namespace nsa::cuda {

// An int that divides ints >= 0. With s = ceil(log2 d) and m = floor(2^32 (2^s - d) / d) + 1, n / d is
// (floor(n m / 2^32) + n) >> s for 0 <= n < 2^31 (Granlund and Montgomery 1994). Nobody divides by less than 1; such a
// value can be held.
class Divisor {
 public:
  constexpr Divisor(int value = 1) : value_(value) {
    const uint64_t d = value < 1 ? 1 : value;
    shift_ = std::bit_width(d - 1);
    magic_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - d) << 32) / d + 1);
  }
  constexpr operator int() const { return value_; }

  friend constexpr int operator/(int n, const Divisor& d) {
    const auto u = static_cast<uint32_t>(n);  // and the product's upper half is below 2^31, too
    return static_cast<int>((static_cast<uint32_t>(uint64_t{u} * d.magic_ >> 32) + u) >> d.shift_);
  }
  friend constexpr int operator%(int n, const Divisor& d) { return n - n / d * d.value_; }
  // Anything wider would be cut off.
  template <std::integral Other>
    requires(!std::same_as<Other, int>)
  friend int operator/(Other, const Divisor&) = delete;
  template <std::integral Other>
    requires(!std::same_as<Other, int>)
  friend int operator%(Other, const Divisor&) = delete;

 private:
  int value_, shift_ = 0;
  uint32_t magic_ = 0;
};

static_assert([] {
  for (const int d :
       {1, 2, 3, 5, 7, 12, 16, 40, 64, 641, 4096, 65535, 65537, 1 << 30, (1 << 30) + 1, INT_MAX - 1, INT_MAX}) {
    const int last = INT_MAX / d * d;  // where an inexact inverse fails first: beside multiples
    for (const int n : {0, 1, d - 1, d, last - 1, last, INT_MAX - 1, INT_MAX}) {
      if (n / Divisor(d) != n / d || n % Divisor(d) != n % d) return false;
    }
  }
  return true;
}());

}  // namespace nsa::cuda
