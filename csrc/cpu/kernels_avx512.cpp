#include "cpu/kernel_set.h"

namespace nsa::cpu {

constinit const KernelSet kAvx512Kernels = make_kernel_set("avx512");

}  // namespace nsa::cpu
