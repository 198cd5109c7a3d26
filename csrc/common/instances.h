// The compiled kernels: one row per line of csrc/instances.cmake.
#pragma once

#include "common/kernel_args.h"
#include "common/range_args.h"
#include "common/selection_args.h"

namespace nsa::cuda {

enum class Operation {
  selected_forward,
  selected_dq,
  selected_dkdv,
  range_forward,
  range_dq,
  range_dkdv,
  select_blocks,
};

struct Instance {
  Backend family;
  Operation operation;
  Dtype dtype;
  int dk, dv;
  const char* name;     // "sm80.selected_forward.bfloat16.128.128"
  TilesOfKernel tiles;  // null but in selected attention
  // the one that fits the operation
  ForwardKernel forward = nullptr;
  BackwardKernel backward = nullptr;
  RangeForwardKernel range_forward = nullptr;
  RangeBackwardKernel range_backward = nullptr;
  SelectionKernel selection = nullptr;
};

const Instance* find_instance(Backend family, Operation operation, Dtype dtype, int64_t dk, int64_t dv);
int num_instances();
const Instance& instance(int index);

}  // namespace nsa::cuda
