// Runs every check and prints one line a device: "cpu: N checks passed". Exits with 1 if any failed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "run.h"

namespace {

class CpuMemory final : public Memory {
 public:
  ~CpuMemory() override {
    for (void* piece : pieces_) std::free(piece);
  }
  nsa::Device device() const override { return nsa::Device::kCpu; }
  void* allocate(std::size_t bytes) override {
    pieces_.push_back(std::aligned_alloc(256, (bytes / 256 + 1) * 256));
    return pieces_.back();
  }
  void copy_in(void* to, const void* from, std::size_t bytes) override { copy(to, from, bytes); }
  void copy_out(void* to, const void* from, std::size_t bytes) override { copy(to, from, bytes); }

 private:
  static void copy(void* to, const void* from, std::size_t bytes) {
    const auto* first = static_cast<const unsigned char*>(from);
    std::copy(first, first + bytes, static_cast<unsigned char*>(to));
  }
  std::vector<void*> pieces_;
};

int report(const char* what, const Tally& tally) {
  if (tally.failures > 0)
    std::printf("%s: %d of %d checks failed\n", what, tally.failures, tally.checks);
  else
    std::printf("%s: %d checks passed\n", what, tally.checks);
  return tally.failures;
}

}  // namespace

int main() {
  std::printf("nsa_cuda %s\n", nsa::version());
  Tally api, ranges, cpu;
  check_api(api);
  check_ranges(ranges);
  for (const nsa::Dtype dtype :
       {nsa::Dtype::kFloat64, nsa::Dtype::kFloat32, nsa::Dtype::kBFloat16, nsa::Dtype::kFloat16}) {
    for (const auto& [head_dim_qk, head_dim_v] : {std::pair{64, 64}, {40, 24}, {7, 3}}) {
      for (const Case& test : make_cases(head_dim_qk, head_dim_v)) {
        CpuMemory memory;
        run_case(test, dtype, memory, cpu);
      }
    }
  }
  int failures = report("api", api) + report("ranges", ranges) + report("cpu", cpu);
#ifdef WITH_CUDA_RUNTIME
  if (nsa::built_with_cuda() && has_gpu()) {
    Tally cuda;
    check_cuda(cuda);
    failures += report("cuda", cuda);
  } else {
    std::printf("cuda: skipped (%s)\n", nsa::built_with_cuda() ? "no GPU" : "CPU-only build");
  }
#else
  std::printf("cuda: skipped (no CUDA toolkit here)\n");
#endif
  return failures == 0 ? 0 : 1;
}
