#include "cpu/kernel_set.h"

namespace nsa::cpu {

constinit const KernelSet kPortableKernels = make_kernel_set("portable");

}  // namespace nsa::cpu
