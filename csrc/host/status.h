// Building a Status: printf-style messages that name the argument, what it was and what is allowed.
#pragma once

#include <nsa_cuda/nsa.h>

namespace nsa {

[[gnu::format(printf, 1, 2)]] Status invalid_argument(const char* format, ...);
[[gnu::format(printf, 1, 2)]] Status not_supported(const char* format, ...);

// The name that messages and kernel lists use: "bfloat16", "cuda", "sm80".
const char* name_of(Dtype dtype);
const char* name_of(Device device);
const char* name_of(Backend backend);

// Bytes of one element.
constexpr std::int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace nsa

// Leaves the enclosing function with the first Status that isn't ok.
#define NSA_RETURN_IF_ERROR(expression)                                      \
  do {                                                                       \
    if (::nsa::Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)
