// Every rule that an argument struct can show, once for the CPU and CUDA. Values in device memory are data, never read
// here. What only a kernel family knows (its head dims, this GPU, the driver) is checked by that family.
#pragma once

#include "host/status.h"

namespace nsa {

// Rows of q and k that exist: B * Tq and B * Tk; packed: total_q and total_k.
struct Rows {
  std::int64_t q, k;
};

// Only for a problem that validate() accepted.
Rows total_rows(const SelectedAttentionProblem& problem);

Status validate(const SelectedAttentionProblem& problem);
Status validate(const RangeAttentionProblem& problem);
Status validate_sizes(const BlockSelection& args);  // all of it but the tensors

// The problem, the pointers and strides of every tensor and num_threads; the workspace apart, since its size is the
// backend's.
Status validate(const SelectedAttentionForward& args);
Status validate(const SelectedAttentionBackward& args);
Status validate(const RangeAttentionForward& args);
Status validate(const RangeAttentionBackward& args);
Status validate(const BlockSelection& args);

Status validate_num_threads(int num_threads);

Status validate_workspace(Device device, const void* workspace, std::size_t given_bytes, std::size_t needed_bytes);

}  // namespace nsa
