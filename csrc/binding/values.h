// Python's numbers and tuples as nsa.h's values, and a Status as an exception.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <tuple>

#include <nsa_cuda/nsa.h>
#include <pybind11/pybind11.h>

namespace nsa_binding {

namespace py = pybind11;

using Address = std::uintptr_t;
// (address, batch_stride, row_stride, head_stride); address 0: absent
using TensorTuple = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;
// (address, is_int64, batch_stride, row_stride, head_stride, entry_stride)
using IndicesTuple = std::tuple<Address, bool, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
// (address, is_int64, batch_stride, row_stride, head_stride)
using CountsTuple = std::tuple<Address, bool, std::int64_t, std::int64_t, std::int64_t>;

// (address, nsa::Dtype, batch_stride, row_stride, head_stride, branch_stride)
using GatesTuple = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline nsa::Tensor make_tensor(const TensorTuple& tuple) {
  const auto& [address, batch_stride, row_stride, head_stride] = tuple;
  return {pointer<void>(address), batch_stride, row_stride, head_stride};
}

inline nsa::GateTensor make_gates(const GatesTuple& tuple) {
  const auto& [address, dtype, batch_stride, row_stride, head_stride, branch_stride] = tuple;
  return {pointer<void>(address), static_cast<nsa::Dtype>(dtype), batch_stride, row_stride, head_stride, branch_stride};
}

// Queries only look whether a tensor is there.
inline nsa::Tensor present_if(bool wanted) {
  static char somewhere;
  nsa::Tensor tensor;
  tensor.data = wanted ? &somewhere : nullptr;
  return tensor;
}

inline nsa::IndexType index_type(bool is_int64) { return is_int64 ? nsa::IndexType::kInt64 : nsa::IndexType::kInt32; }

inline void raise_unless_ok(const nsa::Status& status) {
  switch (status.code) {
    case nsa::StatusCode::kOk:
      return;
    case nsa::StatusCode::kInvalidArgument:
      throw py::value_error(status.message);
    case nsa::StatusCode::kNotSupported:
      PyErr_SetString(PyExc_NotImplementedError, status.message);
      throw py::error_already_set();
    case nsa::StatusCode::kCudaError:
      break;
  }
  throw std::runtime_error(status.message);
}

// Calls the library without the interpreter's lock.
template <typename Arguments>
void call_unlocked(nsa::Status (*function)(const Arguments&), const Arguments& args) {
  nsa::Status status;
  {
    const py::gil_scoped_release release;
    status = function(args);
  }
  raise_unless_ok(status);
}

void bind_gated_sum(py::module_& module);
void bind_range_attention(py::module_& module);

}  // namespace nsa_binding
