// Operations that csrc/common/ may not have yet. These definitions are weak: a kernel's own takes their place at link
// time.
#include "host/status.h"

#ifdef NSA_WITH_CUDA
#include "common/cuda_backend.h"

namespace nsa::cuda {
namespace {

Status missing(const char* operation) {
  return not_supported("device is cuda: there is no kernel yet for %s; cpu is allowed", operation);
}

}  // namespace

[[gnu::weak]] Status workspace_bytes(const BlockSelection&, std::size_t*) { return missing("block selection"); }
[[gnu::weak]] Status select_blocks(const BlockSelection&) { return missing("block selection"); }

}  // namespace nsa::cuda
#endif
