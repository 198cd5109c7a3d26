// Vectors of the instruction set that the including file is compiled for. Only kernels_*.cpp include this, and
// everything is in an unnamed namespace: two files' functions of one name hold different instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace nsa::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T> load_vector(const T* source) {
  Vector<T> v;
  std::memcpy(&v, source, sizeof(v));
  return v;
}

template <typename T>
inline void store_vector(T* target, Vector<T> v) {
  std::memcpy(target, &v, sizeof(v));
}

template <typename T>
inline Vector<T> broadcast(T x) {
  return Vector<T>{} + x;
}

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
inline T sum_of_lanes(Vector<T> v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

template <typename T>
inline T max_of_lanes(Vector<T> v) {
  T highest = v[0];
  for (int i = 1; i < kLanes<T>; ++i) highest = v[i] > highest ? v[i] : highest;
  return highest;
}

template <std::size_t kBytes>
struct IntOf {
  using type = std::int64_t;
};
template <>
struct IntOf<4> {
  using type = std::int32_t;
};

// v with lanes count, count + 1, .. replaced.
template <typename T>
inline Vector<T> first_lanes(Vector<T> v, std::int64_t count, T replacement) {
  using Int = typename IntOf<sizeof(T)>::type;
  if (count >= kLanes<T>) return v;
  Vector<Int> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < static_cast<Int>(count) ? v : broadcast(replacement);
}

// v with lanes 0 .. count - 1 replaced.
template <typename T>
inline Vector<T> last_lanes(Vector<T> v, std::int64_t count, T replacement) {
  using Int = typename IntOf<sizeof(T)>::type;
  Vector<Int> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane >= static_cast<Int>(count) ? v : broadcast(replacement);
}

// What exp needs to know of a type.
template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int kMantissaBits = 23, kBias = 127, kTerms = 8;
  static constexpr float kLowest = -87.0f, kHighest = 88.0f;  // exp stays a normal number
  static constexpr float kRound = 12582912.0f;                // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;  // ln 2, the high part with 9 bits
};
template <>
struct ExpConstants<double> {
  static constexpr int kMantissaBits = 52, kBias = 1023, kTerms = 14;
  static constexpr double kLowest = -708.0, kHighest = 709.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2High = 6.93147180369123816490e-01, kLog2Low = 1.90821492927058770002e-10;
};

template <typename T>
constexpr T inverse_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return static_cast<T>(1 / product);
}

// e^x to about 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, and Taylor's series for e^r, whose next term is below 0.1 ulp.
// 0 below kLowest (also for -inf), e^kHighest above kHighest, NaN for NaN.
template <typename T>
inline Vector<T> exp(Vector<T> x) {
  using C = ExpConstants<T>;
  using Int = Vector<typename IntOf<sizeof(T)>::type>;
  const auto vanishes = x < C::kLowest;
  x = vanishes ? broadcast<T>(C::kLowest) : x;
  x = x > C::kHighest ? broadcast<T>(C::kHighest) : x;
  const Vector<T> shifted = x * static_cast<T>(1.44269504088896340736) + C::kRound;
  const Vector<T> n = shifted - C::kRound;
  const Vector<T> r = (x - n * C::kLog2High) - n * C::kLog2Low;
  Vector<T> series = broadcast<T>(inverse_factorial<T>(C::kTerms - 1));
#pragma GCC unroll 16
  for (int i = C::kTerms - 2; i >= 0; --i) series = series * r + inverse_factorial<T>(i);
  // The low bits of `shifted` hold n; those of kRound above them are shifted out.
  const Int exponent = (bit_cast<Int>(shifted) + C::kBias) << C::kMantissaBits;
  const Vector<T> result = series * bit_cast<Vector<T>>(exponent);
  return vanishes ? Vector<T>{} : result;
}

}  // namespace
}  // namespace nsa::cpu
