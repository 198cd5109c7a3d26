// nsa::gated_sum for Python.
#include <cstdint>
#include <tuple>

#include <nsa_cuda/nsa.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "values.h"

namespace nsa_binding {
namespace {

// (nsa::Device, nsa::Dtype, B, Tq, Hq, Dv)
using SizesTuple = std::tuple<int, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

nsa::GatedSumProblem make_problem(const SizesTuple& tuple) {
  const auto& [device, dtype, batch, rows, num_heads, head_dim] = tuple;
  return {static_cast<nsa::Device>(device), static_cast<nsa::Dtype>(dtype), batch, rows, num_heads, head_dim};
}

template <typename Arguments>
void run(Arguments& args, Address stream, int num_threads) {
  args.stream = pointer<CUstream_st>(stream);
  args.num_threads = num_threads;
  call_unlocked<Arguments>(&nsa::gated_sum, args);
}

void forward(const SizesTuple& sizes, const TensorTuple& o_cmp, const TensorTuple& o_slc, const TensorTuple& o_win,
             const GatesTuple& gates, const TensorTuple& o, Address stream, int num_threads) {
  nsa::GatedSumForward args;
  args.problem = make_problem(sizes);
  args.o_cmp = make_tensor(o_cmp);
  args.o_slc = make_tensor(o_slc);
  args.o_win = make_tensor(o_win);
  args.gates = make_gates(gates);
  args.o = make_tensor(o);
  run(args, stream, num_threads);
}

void backward(const SizesTuple& sizes, const TensorTuple& dout, const TensorTuple& o_cmp, const TensorTuple& o_slc,
              const TensorTuple& o_win, const GatesTuple& dgates, Address stream, int num_threads) {
  nsa::GatedSumBackward args;
  args.problem = make_problem(sizes);
  args.dout = make_tensor(dout);
  args.o_cmp = make_tensor(o_cmp);
  args.o_slc = make_tensor(o_slc);
  args.o_win = make_tensor(o_win);
  args.dgates = make_gates(dgates);
  run(args, stream, num_threads);
}

}  // namespace

void bind_gated_sum(py::module_& module) {
  module.def("gated_sum_forward", &forward);
  module.def("gated_sum_backward", &backward);
}

}  // namespace nsa_binding
