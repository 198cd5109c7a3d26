// Generated rows (instances.inc) -> the table that dispatch looks kernels up in.
#include "common/instances.h"

#include <iterator>

namespace nsa::cuda {

// The names that instances.cmake and Python use for the data types.
inline constexpr Dtype bfloat16 = Dtype::kBFloat16;
inline constexpr Dtype float16 = Dtype::kFloat16;
inline constexpr Backend sm80 = Backend::kSm80;
inline constexpr Backend sm90 = Backend::kSm90;

using Kernel_selected_forward = Status(const ForwardArgs&, const Launch&);
using Kernel_selected_dq = Status(const BackwardArgs&, const Launch&);
using Kernel_selected_dkdv = Status(const BackwardArgs&, const Launch&);
using Kernel_range_forward = Status(const RangeForwardArgs&, const Launch&);
using Kernel_range_dq = Status(const RangeBackwardArgs&, const Launch&);
using Kernel_range_dkdv = Status(const RangeBackwardArgs&, const Launch&);
using Kernel_select_blocks = Status(const SelectionArgs&, const Launch&);

#define NSA_ROW(family, operation, dtype, dk, dv)                  \
  Kernel_##operation family##_##operation##_##dtype##_##dk##_##dv; \
  KernelTiles family##_##operation##_##dtype##_##dk##_##dv##_tiles(const Launch&, int group);
#include "instances.inc"
#undef NSA_ROW

namespace {

template <auto Instance::* kMember, typename Kernel>
constexpr Instance with(Instance row, Kernel kernel) {
  row.*kMember = kernel;
  return row;
}
constexpr Instance with(Instance row, ForwardKernel kernel) { return with<&Instance::forward>(row, kernel); }
constexpr Instance with(Instance row, BackwardKernel kernel) { return with<&Instance::backward>(row, kernel); }
constexpr Instance with(Instance row, RangeForwardKernel kernel) { return with<&Instance::range_forward>(row, kernel); }
constexpr Instance with(Instance row, RangeBackwardKernel kernel) {
  return with<&Instance::range_backward>(row, kernel);
}
constexpr Instance with(Instance row, SelectionKernel kernel) { return with<&Instance::selection>(row, kernel); }

// Which operations' kernels say what they take at a time.
#define NSA_TILES_selected_forward(name) &name##_tiles
#define NSA_TILES_selected_dq(name) &name##_tiles
#define NSA_TILES_selected_dkdv(name) &name##_tiles
#define NSA_TILES_range_forward(name) nullptr
#define NSA_TILES_range_dq(name) nullptr
#define NSA_TILES_range_dkdv(name) nullptr
#define NSA_TILES_select_blocks(name) nullptr

constexpr Instance kInstances[] = {
#define NSA_ROW(family, operation, dtype, dk, dv)                                                       \
  with({family, Operation::operation, dtype, dk, dv, #family "." #operation "." #dtype "." #dk "." #dv, \
        NSA_TILES_##operation(family##_##operation##_##dtype##_##dk##_##dv)},                           \
       &family##_##operation##_##dtype##_##dk##_##dv),
#include "instances.inc"
#undef NSA_ROW
};

}  // namespace

int num_instances() { return static_cast<int>(std::size(kInstances)); }
const Instance& instance(int index) { return kInstances[index]; }

const Instance* find_instance(Backend family, Operation operation, Dtype dtype, int64_t dk, int64_t dv) {
  for (const Instance& row : kInstances) {
    if (row.family == family && row.operation == operation && row.dtype == dtype && row.dk == dk && row.dv == dv)
      return &row;
  }
  return nullptr;
}

}  // namespace nsa::cuda
