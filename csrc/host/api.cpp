// The functions of nsa.h: check, then hand over to the device's backend.
#include <cstdio>
#include <cstring>
#include <exception>

#include "cpu/cpu.h"
#include "host/problem.h"
#include "host/validate.h"

#ifdef NSA_WITH_CUDA
#include "common/cuda_backend.h"
#endif

namespace nsa {
namespace {

template <typename Arguments>
Status validate_sizes(const Arguments& args) {
  return validate(args.problem);
}

// The backend's size for arguments that passed validation.
template <typename Arguments>
Status workspace_of_backend(const Arguments& args, std::size_t* bytes) {
#ifdef NSA_WITH_CUDA
  if (args.problem.device == Device::kCuda) return cuda::workspace_bytes(args, bytes);
#endif
  *bytes = cpu::workspace_bytes(args);
  return {};
}

// What each operation is called in a backend.
#ifdef NSA_WITH_CUDA
Status run_on_cuda(const SelectedAttentionForward& args) { return cuda::selected_attention(args); }
Status run_on_cuda(const SelectedAttentionBackward& args) { return cuda::selected_attention(args); }
Status run_on_cuda(const RangeAttentionForward& args) { return cuda::range_attention(args); }
Status run_on_cuda(const RangeAttentionBackward& args) { return cuda::range_attention(args); }
Status run_on_cuda(const BlockSelection& args) { return cuda::select_blocks(args); }
#endif
void run_on_cpu(const SelectedAttentionForward& args) { cpu::selected_attention(args); }
void run_on_cpu(const SelectedAttentionBackward& args) { cpu::selected_attention(args); }
void run_on_cpu(const RangeAttentionForward& args) { cpu::range_attention(args); }
void run_on_cpu(const RangeAttentionBackward& args) { cpu::range_attention(args); }
void run_on_cpu(const BlockSelection& args) { cpu::select_blocks(args); }

template <typename Arguments>
Status run_on_backend(const Arguments& args) {
#ifdef NSA_WITH_CUDA
  if (args.problem.device == Device::kCuda) return run_on_cuda(args);
#endif
  // OpenMP or the standard library may throw (no memory for a thread's stack); the API doesn't.
  try {
    run_on_cpu(args);
  } catch (const std::exception& error) {
    return not_supported("the CPU backend failed: %s", error.what());
  }
  return {};
}

template <typename Arguments>
Status query_workspace(const Arguments& args, std::size_t* bytes) {
  if (bytes == nullptr) return invalid_argument("bytes is null; allowed is the address of the result");
  *bytes = 0;
  NSA_RETURN_IF_ERROR(validate_sizes(args));
  NSA_RETURN_IF_ERROR(validate_num_threads(args.num_threads));
  return workspace_of_backend(args, bytes);
}

template <typename Arguments>
Status check_and_run(const Arguments& args) {
  NSA_RETURN_IF_ERROR(validate(args));
  std::size_t needed_bytes = 0;
  NSA_RETURN_IF_ERROR(workspace_of_backend(args, &needed_bytes));
  NSA_RETURN_IF_ERROR(validate_workspace(args.problem.device, args.workspace, args.workspace_bytes, needed_bytes));
  return run_on_backend(args);
}

}  // namespace

Status selected_attention_workspace(const SelectedAttentionForward& args, std::size_t* bytes) {
  return query_workspace(args, bytes);
}

Status selected_attention_workspace(const SelectedAttentionBackward& args, std::size_t* bytes) {
  return query_workspace(args, bytes);
}

Status selected_attention(const SelectedAttentionForward& args) { return check_and_run(args); }

Status selected_attention(const SelectedAttentionBackward& args) { return check_and_run(args); }

Status range_attention_workspace(const RangeAttentionForward& args, std::size_t* bytes) {
  return query_workspace(args, bytes);
}

Status range_attention_workspace(const RangeAttentionBackward& args, std::size_t* bytes) {
  return query_workspace(args, bytes);
}

Status range_attention(const RangeAttentionForward& args) { return check_and_run(args); }

Status range_attention(const RangeAttentionBackward& args) { return check_and_run(args); }

Status block_selection_workspace(const BlockSelection& args, std::size_t* bytes) {
  return query_workspace(args, bytes);
}

Status select_blocks(const BlockSelection& args) { return check_and_run(args); }

Status choose_selected_attention(const SelectedAttentionProblem& problem, const GpuModel& gpu,
                                 SelectedAttentionChoice* choice) {
  if (choice == nullptr) return invalid_argument("choice is null; allowed is the address of a SelectedAttentionChoice");
  NSA_RETURN_IF_ERROR(validate(problem));
  if (problem.device != Device::kCuda) {
    return invalid_argument("device is cpu; allowed is cuda: the CPU backend has one kernel a dtype");
  }
  if (gpu.compute_capability != 0) {
    NSA_RETURN_IF_ERROR(check_at_least("gpu.compute_capability", gpu.compute_capability, 1));
    NSA_RETURN_IF_ERROR(check_at_least("gpu.num_sms", gpu.num_sms, 1));
    NSA_RETURN_IF_ERROR(check_at_least("gpu.shared_memory", gpu.shared_memory, 99 * 1024));
  }
#ifdef NSA_WITH_CUDA
  return cuda::choose_kernels(problem, gpu, choice);
#else
  return {};  // validate() has refused it
#endif
}

Status selected_attention_kernel(const SelectedAttentionProblem& problem, char* name, std::size_t name_bytes) {
  if (name == nullptr) return invalid_argument("name is null; allowed is the address of name_bytes characters");
  NSA_RETURN_IF_ERROR(validate(problem));
#ifdef NSA_WITH_CUDA
  if (problem.device == Device::kCuda) return cuda::kernel_name(problem, name, name_bytes);
#endif
  char text[64];
  std::snprintf(text, sizeof(text), "cpu.selected_forward.%s", name_of(problem.dtype));
  if (name_bytes <= std::strlen(text)) {
    return invalid_argument("name_bytes is %zu; this name needs %zu", name_bytes, std::strlen(text) + 1);
  }
  std::strcpy(name, text);
  return {};
}

}  // namespace nsa
