#include "cpu/kernels.h"

#include <type_traits>

namespace nsa::cpu {
namespace {

const KernelSet& choose() {
#ifdef NSA_CPU_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return kAvx512Kernels;
  if (avx2) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace

template <typename Real>
const Kernels<Real>& kernels() {
  static const KernelSet& best = choose();
  if constexpr (std::is_same_v<Real, double>) {
    return best.of_double;
  } else {
    return best.of_float;
  }
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace nsa::cpu
