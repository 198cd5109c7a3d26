#pragma once

#include <cstddef>
#include <cstdint>

namespace nsa::cpu {

// A cache line, and the widest vector: rows of scratch are padded to it.
inline constexpr std::int64_t kAlignment = 64;

template <typename Real>
constexpr std::int64_t padded(std::int64_t count) {
  constexpr std::int64_t kStep = kAlignment / sizeof(Real);
  return (count + kStep - 1) / kStep * kStep;
}

// Hands out aligned pieces of the workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(std::int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace nsa::cpu
