#include "cpu/kernel_set.h"

namespace nsa::cpu {

constinit const KernelSet kAvx2Kernels = make_kernel_set("avx2");

}  // namespace nsa::cpu
