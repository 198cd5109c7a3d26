// What this build holds. CMake writes build_values.h.
#include <iterator>

#include "build_values.h"
#include "host/status.h"

#ifdef NSA_WITH_CUDA
#include "common/cuda_backend.h"
#endif

namespace nsa {
namespace {

constexpr const char* kCpuKernels[] = {
    "cpu.selected_forward.float64",   "cpu.selected_forward.float32",  "cpu.selected_forward.bfloat16",
    "cpu.selected_forward.float16",   "cpu.selected_backward.float64", "cpu.selected_backward.float32",
    "cpu.selected_backward.bfloat16", "cpu.selected_backward.float16", "cpu.range_forward.float64",
    "cpu.range_forward.float32",      "cpu.range_forward.bfloat16",    "cpu.range_forward.float16",
    "cpu.range_backward.float64",     "cpu.range_backward.float32",    "cpu.range_backward.bfloat16",
    "cpu.range_backward.float16",     "cpu.select_blocks.float64",     "cpu.select_blocks.float32",
    "cpu.select_blocks.bfloat16",     "cpu.select_blocks.float16",
};
constexpr int kNumCpuKernels = static_cast<int>(std::size(kCpuKernels));

}  // namespace

const char* version() { return NSA_VERSION; }

const char* cuda_architectures() { return NSA_CUDA_ARCHITECTURES; }
const char* cuda_toolkit() { return NSA_CUDA_TOOLKIT; }

#ifdef NSA_WITH_CUDA
bool built_with_cuda() { return true; }
int num_compiled_kernels() { return kNumCpuKernels + cuda::num_compiled_kernels(); }
#else
bool built_with_cuda() { return false; }
int num_compiled_kernels() { return kNumCpuKernels; }
#endif

const char* compiled_kernel(int index) {
  if (index < 0 || index >= num_compiled_kernels()) return "";
  if (index < kNumCpuKernels) return kCpuKernels[index];
#ifdef NSA_WITH_CUDA
  return cuda::compiled_kernel(index - kNumCpuKernels);
#else
  return "";
#endif
}

}  // namespace nsa
