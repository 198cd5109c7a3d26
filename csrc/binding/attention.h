// Forward and backward of an attention for Python. An Operation names nsa.h's structs, Forward and Backward, and its
// functions, workspace(args, bytes) and call(args).
#pragma once

#include "values.h"

namespace nsa_binding {

template <typename Operation>
using ProblemOf = decltype(Operation::Forward::problem);

template <typename Operation, typename Arguments>
std::size_t workspace_bytes(Arguments& args, int num_threads) {
  args.num_threads = num_threads;
  std::size_t bytes = 0;
  raise_unless_ok(Operation::workspace(args, &bytes));
  return bytes;
}

template <typename Operation>
std::size_t forward_workspace(const ProblemOf<Operation>& problem, bool want_lse, int num_threads) {
  typename Operation::Forward args;
  args.problem = problem;
  args.lse = present_if(want_lse);
  return workspace_bytes<Operation>(args, num_threads);
}

template <typename Operation>
std::size_t backward_workspace(const ProblemOf<Operation>& problem, bool need_dq, bool need_dk, bool need_dv,
                               bool has_dlse, int num_threads) {
  typename Operation::Backward args;
  args.problem = problem;
  args.dq = present_if(need_dq);
  args.dk = present_if(need_dk);
  args.dv = present_if(need_dv);
  args.dlse = present_if(has_dlse);
  return workspace_bytes<Operation>(args, num_threads);
}

// Fills what every call ends with, and calls.
template <typename Arguments>
void run(Arguments& args, nsa::Status (*call)(const Arguments&), Address workspace, std::size_t workspace_bytes,
         Address stream, int num_threads) {
  args.workspace = pointer<void>(workspace);
  args.workspace_bytes = workspace_bytes;
  args.stream = pointer<CUstream_st>(stream);
  args.num_threads = num_threads;
  call_unlocked(call, args);
}

// What forward and backward have in common.
template <typename Arguments, typename Problem>
Arguments with_tensors(const Problem& problem, const TensorTuple& q, const TensorTuple& k, const TensorTuple& v,
                       const TensorTuple& o, const TensorTuple& lse) {
  Arguments args;
  args.problem = problem;
  args.q = make_tensor(q);
  args.k = make_tensor(k);
  args.v = make_tensor(v);
  args.o = make_tensor(o);
  args.lse = make_tensor(lse);
  return args;
}

template <typename Operation>
void forward(const ProblemOf<Operation>& problem, const TensorTuple& q, const TensorTuple& k, const TensorTuple& v,
             const TensorTuple& o, const TensorTuple& lse, Address workspace, std::size_t workspace_bytes,
             Address stream, int num_threads) {
  auto args = with_tensors<typename Operation::Forward>(problem, q, k, v, o, lse);
  run(args, &Operation::call, workspace, workspace_bytes, stream, num_threads);
}

template <typename Operation>
void backward(const ProblemOf<Operation>& problem, const TensorTuple& q, const TensorTuple& k, const TensorTuple& v,
              const TensorTuple& o, const TensorTuple& lse, const TensorTuple& dout, const TensorTuple& dlse,
              const TensorTuple& delta, const GatesTuple& gate, const TensorTuple& dq, const TensorTuple& dk,
              const TensorTuple& dv, bool accumulate_dq, Address workspace, std::size_t workspace_bytes, Address stream,
              int num_threads) {
  auto args = with_tensors<typename Operation::Backward>(problem, q, k, v, o, lse);
  args.dout = make_tensor(dout);
  args.dlse = make_tensor(dlse);
  args.delta = make_tensor(delta);
  args.gate = make_gates(gate);
  args.accumulate_dq = accumulate_dq;
  args.dq = make_tensor(dq);
  args.dk = make_tensor(dk);
  args.dv = make_tensor(dv);
  run(args, &Operation::call, workspace, workspace_bytes, stream, num_threads);
}

}  // namespace nsa_binding
