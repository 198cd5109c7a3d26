// What host/ calls for tensors in GPU memory. Arguments have passed validation.
#pragma once

#include <cstddef>

#include "nsa_cuda/nsa.h"

namespace nsa::cuda {

Status workspace_bytes(const SelectedAttentionForward& args, std::size_t* bytes);
Status workspace_bytes(const SelectedAttentionBackward& args, std::size_t* bytes);
Status selected_attention(const SelectedAttentionForward& args);
Status selected_attention(const SelectedAttentionBackward& args);

Status gated_sum(const GatedSumForward& args);
Status gated_sum(const GatedSumBackward& args);

// The forward kernel that the call would run; kNotSupported where there is none.
Status kernel_name(const SelectedAttentionProblem& problem, char* name, std::size_t name_bytes);

Status choose_kernels(const SelectedAttentionProblem& problem, const GpuModel& model, SelectedAttentionChoice* choice);

Status workspace_bytes(const RangeAttentionForward& args, std::size_t* bytes);
Status workspace_bytes(const RangeAttentionBackward& args, std::size_t* bytes);
Status range_attention(const RangeAttentionForward& args);
Status range_attention(const RangeAttentionBackward& args);

Status workspace_bytes(const BlockSelection& args, std::size_t* bytes);
Status select_blocks(const BlockSelection& args);

int num_compiled_kernels();
const char* compiled_kernel(int index);

}  // namespace nsa::cuda
