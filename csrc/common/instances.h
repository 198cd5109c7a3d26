// The compiled kernels: one row per line of csrc/instances.cmake.
#pragma once

#include "common/kernel_args.h"

namespace nsa::cuda {

enum class Operation { selected_forward, selected_dq, selected_dkdv };

struct Instance {
  Backend family;
  Operation operation;
  Dtype dtype;
  int dk, dv;
  const char* name;       // "sm80.selected_forward.bfloat16.128.128"
  ForwardKernel forward;  // one of the two
  BackwardKernel backward;
};

const Instance* find_instance(Backend family, Operation operation, Dtype dtype, int64_t dk, int64_t dv);
int num_instances();
const Instance& instance(int index);

}  // namespace nsa::cuda
