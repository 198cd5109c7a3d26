// Gated sum: checks, then the device's backend.
#include <cinttypes>
#include <exception>
#include <limits>

#include "cpu/cpu.h"
#include "host/tensor_view.h"
#include "host/validate.h"

#ifdef NSA_WITH_CUDA
#include "common/cuda_backend.h"
#endif

namespace nsa {
namespace {

constexpr std::int64_t kBranches = 3;

Status check_device(const GatedSumProblem& p) {
  if (p.device != Device::kCpu && p.device != Device::kCuda) {
    return invalid_argument("device is %d; allowed are 0 (cpu) and 1 (cuda)", static_cast<int>(p.device));
  }
  if (p.dtype < Dtype::kFloat64 || p.dtype > Dtype::kFloat16) {
    return invalid_argument("dtype is %d; allowed are 0 (float64), 1 (float32), 2 (bfloat16) and 3 (float16)",
                            static_cast<int>(p.dtype));
  }
  if (p.device == Device::kCpu) return {};
  if (!built_with_cuda()) return not_supported("device is cuda, but this build of nsa_cuda has the CPU backend alone");
  if (p.dtype != Dtype::kBFloat16 && p.dtype != Dtype::kFloat16) {
    return not_supported("dtype is %s; CUDA kernels take bfloat16 or float16", name_of(p.dtype));
  }
  if (p.head_dim % 8 != 0) {
    return not_supported("head_dim is %" PRId64 "; CUDA kernels take a multiple of 8", p.head_dim);
  }
  return {};
}

Status check_sizes(const GatedSumProblem& p) {
  const struct {
    const char* name;
    std::int64_t value, least;
  } sizes[] = {{"batch", p.batch, 0}, {"rows", p.rows, 0}, {"num_heads", p.num_heads, 1}, {"head_dim", p.head_dim, 1}};
  std::int64_t all = 1;
  for (const auto& size : sizes) {
    if (size.value < size.least) {
      return invalid_argument("%s is %" PRId64 "; allowed is %" PRId64 " or more", size.name, size.value, size.least);
    }
    // as if empty dimensions held one, so that every partial product fits, too
    if (__builtin_mul_overflow(all, size.value > 1 ? size.value : 1, &all)) {
      return invalid_argument("%s is %" PRId64 "; allowed are fewer than 2^63 elements in total", size.name,
                              size.value);
    }
  }
  const std::int64_t most = std::numeric_limits<std::int32_t>::max();
  if (p.device == Device::kCuda && p.batch > 0 && p.rows > most / p.batch) {
    return invalid_argument("batch is %" PRId64 " and rows %" PRId64 "; allowed are %" PRId64 " rows in total on cuda",
                            p.batch, p.rows, most);
  }
  return {};
}

Status check_gates(const char* name, const GatedSumProblem& p, const GateTensor& gates, Access access) {
  NSA_RETURN_IF_ERROR(check_gate(name, gates, p.batch, p.rows, p.num_heads, access));
  std::int64_t reach = 1;
  if (add_reach(kBranches, gates.branch_stride, &reach) && reach < std::numeric_limits<std::int64_t>::max() / 16 &&
      (access == Access::kRead || gates.branch_stride != 0)) {
    return {};
  }
  return invalid_argument("%s.branch_stride is %" PRId64 "; allowed are strides inside one buffer%s", name,
                          gates.branch_stride, access == Access::kRead ? "" : " other than 0");
}

Status check_tensor(const char* name, const GatedSumProblem& p, const Tensor& tensor, Access access) {
  const std::int64_t bytes = size_of(p.dtype);
  return check_view({name, tensor, p.batch, p.rows, p.num_heads, p.head_dim, bytes,
                     p.device == Device::kCuda ? kCudaAlignment : bytes, access});
}

Status validate(const GatedSumForward& args) {
  const GatedSumProblem& p = args.problem;
  NSA_RETURN_IF_ERROR(check_device(p));
  NSA_RETURN_IF_ERROR(check_sizes(p));
  NSA_RETURN_IF_ERROR(validate_num_threads(args.num_threads));
  NSA_RETURN_IF_ERROR(check_tensor("o_cmp", p, args.o_cmp, Access::kRead));
  NSA_RETURN_IF_ERROR(check_tensor("o_slc", p, args.o_slc, Access::kRead));
  NSA_RETURN_IF_ERROR(check_tensor("o_win", p, args.o_win, Access::kRead));
  NSA_RETURN_IF_ERROR(check_gates("gates", p, args.gates, Access::kRead));
  return check_tensor("o", p, args.o, Access::kWritten);
}

Status validate(const GatedSumBackward& args) {
  const GatedSumProblem& p = args.problem;
  NSA_RETURN_IF_ERROR(check_device(p));
  NSA_RETURN_IF_ERROR(check_sizes(p));
  NSA_RETURN_IF_ERROR(validate_num_threads(args.num_threads));
  NSA_RETURN_IF_ERROR(check_tensor("dout", p, args.dout, Access::kRead));
  if (args.o_cmp.data) NSA_RETURN_IF_ERROR(check_tensor("o_cmp", p, args.o_cmp, Access::kRead));
  if (args.o_slc.data) NSA_RETURN_IF_ERROR(check_tensor("o_slc", p, args.o_slc, Access::kRead));
  if (args.o_win.data) NSA_RETURN_IF_ERROR(check_tensor("o_win", p, args.o_win, Access::kRead));
  return check_gates("dgates", p, args.dgates, Access::kWritten);
}

template <typename Arguments>
Status check_and_run(const Arguments& args) {
  NSA_RETURN_IF_ERROR(validate(args));
#ifdef NSA_WITH_CUDA
  if (args.problem.device == Device::kCuda) return cuda::gated_sum(args);
#endif
  try {  // OpenMP may throw (no memory for a thread's stack); the API doesn't
    cpu::gated_sum(args);
  } catch (const std::exception& error) {
    return not_supported("the CPU backend failed: %s", error.what());
  }
  return {};
}

}  // namespace

Status gated_sum(const GatedSumForward& args) { return check_and_run(args); }
Status gated_sum(const GatedSumBackward& args) { return check_and_run(args); }

}  // namespace nsa
