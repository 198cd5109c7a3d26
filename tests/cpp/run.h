// One case through the library: forward and backward, held against naive.h.
#pragma once

#include <nsa_cuda/nsa.h>

#include <cstddef>

#include "naive.h"

// Where the library's tensors live. Everything allocated is freed with the object; allocations are 256-byte aligned.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual nsa::Device device() const = 0;
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void copy_in(void* to, const void* from, std::size_t bytes) = 0;
  virtual void copy_out(void* to, const void* from, std::size_t bytes) = 0;
};

// How often a comparison was made and how often it failed; failures are printed.
struct Tally {
  int checks = 0, failures = 0;
  void check(bool ok, const char* format, ...) __attribute__((format(printf, 3, 4)));
};

// Forward, then backward with every gradient, in dtype; outputs are filled with NaN beforehand. Bitwise the same twice.
void run_case(const Case& test, nsa::Dtype dtype, Memory& memory, Tally& tally);

// The cases that every device must pass with these head dims.
std::vector<Case> make_cases(std::int64_t head_dim_qk, std::int64_t head_dim_v);

void check_api(Tally& tally);
void check_ranges(Tally& tally);  // range attention and block selection, on the CPU

#ifdef WITH_CUDA_RUNTIME
bool has_gpu();
void check_cuda(Tally& tally);
#endif
