// What the API says of itself, and what it refuses with which message.
#include <cstring>

#include "run.h"

namespace {

nsa::SelectedAttentionProblem valid_problem() {
  nsa::SelectedAttentionProblem problem;
  problem.batch = 1;
  problem.seqlen_q = problem.seqlen_k = 64;
  problem.num_heads_q = 4;
  problem.num_heads_k = 2;
  problem.head_dim_qk = problem.head_dim_v = 32;
  problem.block_size = 16;
  problem.num_indices = 2;
  problem.softmax_scale = 0.25;
  return problem;
}

void expect_refusal(const nsa::SelectedAttentionProblem& problem, nsa::StatusCode code, const char* text,
                    Tally& tally) {
  nsa::SelectedAttentionForward args;
  args.problem = problem;
  std::size_t bytes = 0;
  const nsa::Status status = nsa::selected_attention_workspace(args, &bytes);
  tally.check(status.code == code && std::strstr(status.message, text) != nullptr,
              "refusal: expected code %d and '%s', got code %d and '%s'", static_cast<int>(code), text,
              static_cast<int>(status.code), status.message);
}

void check_refusals(Tally& tally) {
  using enum nsa::StatusCode;
  nsa::SelectedAttentionProblem problem = valid_problem();
  problem.num_heads_q = 5;
  expect_refusal(problem, kInvalidArgument, "num_heads_q is 5", tally);
  problem = valid_problem();
  problem.seqlen_k = -1;
  expect_refusal(problem, kInvalidArgument, "seqlen_k is -1", tally);
  problem = valid_problem();
  problem.backend = nsa::Backend::kSm80;
  expect_refusal(problem, kInvalidArgument, "backend is sm80", tally);
  problem = valid_problem();
  problem.device = nsa::Device::kCuda;
  expect_refusal(problem, kNotSupported, nsa::built_with_cuda() ? "dtype is float32" : "FORCE_CUDA=1", tally);
  if (nsa::built_with_cuda()) {
    problem.dtype = nsa::Dtype::kBFloat16;
    problem.block_size = 48;
    expect_refusal(problem, kNotSupported, "block_size is 48; CUDA kernels take 16, 32, 64 or 128", tally);
  }
}

void check_names(Tally& tally) {
  char name[64];
  const nsa::SelectedAttentionProblem problem = valid_problem();
  nsa::Status status = nsa::selected_attention_kernel(problem, name, sizeof(name));
  tally.check(status.ok() && std::strcmp(name, "cpu.selected_forward.float32") == 0, "kernel name is '%s' (%s)", name,
              status.message);
  status = nsa::selected_attention_kernel(problem, name, 4);
  tally.check(status.code == nsa::StatusCode::kInvalidArgument, "a name of 4 bytes was accepted");
  bool listed = false;
  for (int i = 0; i < nsa::num_compiled_kernels(); ++i)
    listed = listed || std::strcmp(nsa::compiled_kernel(i), name) == 0;
  tally.check(listed, "'%s' isn't among the compiled kernels", name);
  tally.check(std::strlen(nsa::compiled_kernel(nsa::num_compiled_kernels())) == 0, "a kernel past the end has a name");
  tally.check(std::strlen(nsa::version()) > 0, "the version is empty");
  tally.check((std::strlen(nsa::cuda_toolkit()) > 0) == nsa::built_with_cuda(), "the toolkit is '%s'",
              nsa::cuda_toolkit());
}

// What would run where, without a GPU.
void check_choice(Tally& tally) {
  const nsa::GpuModel h100 = {90, 132, 232448};
  nsa::SelectedAttentionProblem problem = valid_problem();
  nsa::SelectedAttentionChoice choice;
  nsa::Status status = nsa::choose_selected_attention(problem, h100, &choice);
  tally.check(status.code == nsa::StatusCode::kInvalidArgument, "a choice was made for the CPU");
  problem.device = nsa::Device::kCuda;
  problem.dtype = nsa::Dtype::kBFloat16;
  problem.head_dim_qk = problem.head_dim_v = 128;
  problem.block_size = 64;
  status = nsa::choose_selected_attention(problem, h100, nullptr);
  tally.check(status.code == nsa::StatusCode::kInvalidArgument, "a null choice was accepted");
  status = nsa::choose_selected_attention(problem, h100, &choice);
  if (!nsa::built_with_cuda()) {
    tally.check(status.code == nsa::StatusCode::kNotSupported, "a choice was made of no kernels");
    return;
  }
  tally.check(status.ok() && std::strstr(choice.forward.name, ".selected_forward.bfloat16.128.128") != nullptr,
              "the forward is '%s' (%s)", choice.forward.name, status.message);
  tally.check(choice.dkdv.tiles.keys == 64 && choice.dkdv.tiles.shared_memory <= h100.shared_memory,
              "dK and dV take %d keys and %d bytes", choice.dkdv.tiles.keys, choice.dkdv.tiles.shared_memory);
}

// A call that lacks its tensors or its workspace is refused, not run.
void check_pointers(Tally& tally) {
  nsa::SelectedAttentionForward args;
  args.problem = valid_problem();
  nsa::Status status = nsa::selected_attention(args);
  tally.check(status.code == nsa::StatusCode::kInvalidArgument && std::strstr(status.message, "block_indices is null"),
              "without tensors: '%s'", status.message);
  status = nsa::selected_attention_workspace(args, nullptr);
  tally.check(status.code == nsa::StatusCode::kInvalidArgument, "a null result was accepted");
}

}  // namespace

void check_api(Tally& tally) {
  check_refusals(tally);
  check_names(tally);
  check_choice(tally);
  check_pointers(tally);
}
