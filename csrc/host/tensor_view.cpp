#include "host/tensor_view.h"

#include <cinttypes>
#include <limits>

namespace nsa {
namespace {

Status check_stride(const View& view, const char* stride_name, std::int64_t stride, std::int64_t size) {
  if (size <= 1) return {};
  if (stride % (view.alignment / view.element_bytes) != 0) {
    return invalid_argument("%s.%s is %" PRId64 " elements; allowed is a multiple of %" PRId64 " (%" PRId64 " bytes)",
                            view.name, stride_name, stride, view.alignment / view.element_bytes, view.alignment);
  }
  // dim is contiguous, so a shorter stride would put two elements of a result on one address.
  if (view.access == Access::kWritten && stride < view.dim && stride > -view.dim) {
    return invalid_argument("%s.%s is %" PRId64 " elements; %s is written, so %" PRId64 " or more are allowed",
                            view.name, stride_name, stride, view.name, view.dim);
  }
  return {};
}

}  // namespace

bool add_reach(std::int64_t size, std::int64_t stride, std::int64_t* reach) {
  if (size <= 1) return true;
  std::int64_t step;
  if (__builtin_mul_overflow(size - 1, stride, &step) || step == std::numeric_limits<std::int64_t>::min()) return false;
  return !__builtin_add_overflow(*reach, step < 0 ? -step : step, reach);
}

Status check_view(const View& view) {
  if (view.batch == 0 || view.rows == 0) return {};
  if (view.tensor.data == nullptr) {
    return invalid_argument("%s is null; allowed is the address of its [%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64
                            "] elements",
                            view.name, view.batch, view.rows, view.heads, view.dim);
  }
  if (reinterpret_cast<std::uintptr_t>(view.tensor.data) % static_cast<std::uintptr_t>(view.alignment) != 0) {
    return invalid_argument("%s is %p; allowed is a multiple of %" PRId64 " bytes", view.name, view.tensor.data,
                            view.alignment);
  }
  NSA_RETURN_IF_ERROR(check_stride(view, "batch_stride", view.tensor.batch_stride, view.batch));
  NSA_RETURN_IF_ERROR(check_stride(view, "row_stride", view.tensor.row_stride, view.rows));
  NSA_RETURN_IF_ERROR(check_stride(view, "head_stride", view.tensor.head_stride, view.heads));
  std::int64_t reach = view.dim, bytes;
  if (!add_reach(view.batch, view.tensor.batch_stride, &reach) ||
      !add_reach(view.rows, view.tensor.row_stride, &reach) ||
      !add_reach(view.heads, view.tensor.head_stride, &reach) ||
      __builtin_mul_overflow(reach, view.element_bytes, &bytes)) {
    return invalid_argument("%s has strides (%" PRId64 ", %" PRId64 ", %" PRId64
                            ") that lead past 2^63 bytes; allowed are strides inside one buffer",
                            view.name, view.tensor.batch_stride, view.tensor.row_stride, view.tensor.head_stride);
  }
  return {};
}

Status check_gate(const char* name, const GateTensor& gate, std::int64_t batch, std::int64_t rows, std::int64_t heads,
                  Access access) {
  if (gate.dtype < Dtype::kFloat64 || gate.dtype > Dtype::kFloat16) {
    return invalid_argument("%s.dtype is %d; allowed are 0 (float64), 1 (float32), 2 (bfloat16) and 3 (float16)", name,
                            static_cast<int>(gate.dtype));
  }
  const std::int64_t bytes = size_of(gate.dtype);
  const Tensor tensor = {gate.data, gate.batch_stride, gate.row_stride, gate.head_stride};
  return check_view({name, tensor, batch, rows, heads, 1, bytes, bytes, access});
}

}  // namespace nsa
