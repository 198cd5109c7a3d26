// From validated arguments to launches: picks the kernels, lays out the workspace, runs the steps in order.
#include "common/cuda_backend.h"

#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>

#include "common/dispatch.h"
#include "sm90/selected_dq/config.h"
#include "sm90/selected_forward/config.h"

namespace nsa::cuda {

Status make_status(StatusCode code, const char* format, ...) {
  Status status;
  status.code = code;
  va_list args;
  va_start(args, format);
  std::vsnprintf(status.message, sizeof(status.message), format, args);
  va_end(args);
  return status;
}

Status cuda_status(int error, const char* what) {
  const auto code = static_cast<cudaError_t>(error);
  if (code == cudaSuccess) return {};
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorUnsupportedPtxVersion) {
    return make_status(
        StatusCode::kNotSupported,
        "%s: this build holds no code for this GPU (%s); it was built for %s. Rebuild with NSA_CUDA_ARCHITECTURES "
        "set to the GPU's architecture, or update the driver",
        what, cudaGetErrorName(code), cuda_architectures());
  }
  if (code == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return make_status(StatusCode::kNotSupported,
                       "%s: the NVIDIA driver is too old (or absent): it supports CUDA %d.%d, this build needs %s (%s)",
                       what, driver / 1000, driver % 1000 / 10, cuda_toolkit(), cudaGetErrorName(code));
  }
  return make_status(StatusCode::kCudaError, "%s: %s (%s)", what, cudaGetErrorName(code), cudaGetErrorString(code));
}

TensorArg tensor_arg(const Tensor& tensor, bool packed, int64_t batch, int64_t rows, int element_bytes) {
  TensorArg arg;
  arg.data = static_cast<char*>(tensor.data);
  arg.batch_bytes = tensor.batch_stride * element_bytes;
  arg.row_bytes = tensor.row_stride * element_bytes;
  arg.head_bytes = tensor.head_stride * element_bytes;
  const bool through = packed || batch <= 1 || tensor.batch_stride == rows * tensor.row_stride;
  arg.rows_per_batch = through ? INT_MAX : static_cast<int>(rows);
  return arg;
}

Status query_gpu(cudaStream_t stream, Gpu* gpu) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&gpu->launch.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&gpu->launch.num_sms, cudaDevAttrMultiProcessorCount);
  ask(&gpu->major, cudaDevAttrComputeCapabilityMajor);
  ask(&gpu->minor, cudaDevAttrComputeCapabilityMinor);
  gpu->launch.stream = stream;
  if (error == cudaSuccess && gpu->major < 8) {
    return make_status(StatusCode::kNotSupported,
                       "the GPU has compute capability %d.%d; the CUDA kernels need 8.0 (Ampere) or newer", gpu->major,
                       gpu->minor);
  }
  return cuda_status(error, "asking for the GPU's properties");
}

Status find_kernel(const KernelRequest& r, const Gpu& gpu, Operation operation, bool uses_sm90,
                   const Instance** found) {
  *found = nullptr;
  const bool hopper = gpu.major == 9 && gpu.minor == 0;
  if (r.backend == Backend::kSm90 && !hopper) {
    return make_status(StatusCode::kNotSupported,
                       "backend is sm90; the GPU has compute capability %d.%d, sm90 kernels run on 9.0", gpu.major,
                       gpu.minor);
  }
  const bool forced = r.backend == Backend::kSm90 && uses_sm90;
  if (hopper && uses_sm90) *found = find_instance(Backend::kSm90, operation, r.dtype, r.head_dim_qk, r.head_dim_v);
  if (!*found && !forced) *found = find_instance(Backend::kSm80, operation, r.dtype, r.head_dim_qk, r.head_dim_v);
  if (*found) return {};
  // what it holds of this operation and dtype, e.g. "(64, 64), (128, 128)"
  char held[256] = "";
  int used = 0;
  for (int i = 0; i < num_instances(); ++i) {
    const Instance& row = instance(i);
    const bool fits =
        row.operation == operation && row.dtype == r.dtype && (r.backend == Backend::kAuto || r.backend == row.family);
    if (!fits || used >= static_cast<int>(sizeof(held)) - 16) continue;
    used += std::snprintf(held + used, sizeof(held) - used, "%s(%d, %d)", used ? ", " : "", row.dk, row.dv);
  }
  const char* family = r.backend == Backend::kSm90 ? "sm90 " : r.backend == Backend::kSm80 ? "sm80 " : "";
  return make_status(StatusCode::kNotSupported,
                     "head_dim_qk is %lld, head_dim_v is %lld, dtype is %s: this build holds %skernels for "
                     "(head_dim_qk, head_dim_v) = "
                     "%s",
                     static_cast<long long>(r.head_dim_qk), static_cast<long long>(r.head_dim_v),
                     r.dtype == Dtype::kBFloat16 ? "bfloat16" : "float16", family, held[0] ? held : "none");
}

Status check_rows(int64_t rows) {
  if (rows < INT_MAX - 65536) return {};
  return make_status(StatusCode::kNotSupported,
                     "q has %lld rows of one kv head (tokens times G); CUDA kernels take fewer than 2^31",
                     static_cast<long long>(rows));
}

namespace {

// Whether the Hopper kernel of an operation runs, where there is one. It multiplies 64 keys at a time, most of which a
// smaller block would leave empty. Times in ms at 64K tokens, 64 / 4 heads, D 128, one H100, Hopper against mma.sync:
//   forward  clustered 5.8 : 8.1, uniform 12.9 : 15.9   (neighbours that agree, and that don't)
//   dQ       clustered 7.7 : 11.5, uniform 15.0 : 19.2
//   dK/dV    clustered 9.7 : 19.1, uniform 8.7 : 19.1
// Forward and dQ each need the unions first, 0.03 to 0.05 ms.
bool uses_sm90(Operation operation, const SelectedAttentionProblem& p) {
  if (p.block_size >= 64) return p.backend != Backend::kSm80;
  return p.backend == Backend::kSm90 && operation != Operation::selected_dkdv;
}

Status find(const SelectedAttentionProblem& p, const Gpu& gpu, Operation operation, const Instance** found) {
  return find_kernel({p.backend, p.dtype, p.head_dim_qk, p.head_dim_v}, gpu, operation, uses_sm90(operation, p), found);
}

// For sizes. Null where the call will fail: it says why.
const Instance* find_if_possible(const SelectedAttentionProblem& p, Operation operation) {
  Gpu gpu;
  const Instance* kernel = nullptr;
  if (query_gpu(nullptr, &gpu).ok()) find(p, gpu, operation, &kernel);
  return kernel;
}

// The tile whose unions a kernel reads; 0 warps: it walks the lists itself.
TileSize union_tile(const Instance* kernel) {
  if (!kernel || kernel->family != Backend::kSm90) return {0, 0};
  if (kernel->operation == Operation::selected_forward) return sm90::selected_forward::tile_size(kernel->dv);
  return sm90::selected_dq::tile_size(kernel->dk);
}

struct TilePlan {
  Plan plan;
  TileUnions unions;
};

// kernel: whose tiles the plan is for.
TilePlan carve_tiles(const SelectedAttentionProblem& p, const Instance* kernel, Carver& carver) {
  const TileSize size = union_tile(kernel);
  TilePlan tiles = {carve_plan(p, carver, size.warps ? 4 : 1), {}};  // wgmma multiplies four units
  if (size.warps) tiles.unions = carve_unions(p, tiles.plan, size, carver);
  return tiles;
}

Status make_tiles(const SelectedAttentionProblem& p, const Plan& plan, const TileUnions& unions, cudaStream_t stream) {
  Status status = make_plan(p, plan, stream);
  if (!status.ok() || !unions.warps || plan.total_q == 0) return status;
  return make_unions(plan, unions, static_cast<int>(p.num_heads_k), static_cast<int>(p.num_heads_q / p.num_heads_k),
                     stream);
}

Status check_rows(const SelectedAttentionProblem& p, const Plan& plan) {
  return cuda::check_rows(plan.total_q * (p.num_heads_q / p.num_heads_k));
}

// Without keys nothing is read, but addresses are still formed.
void point_somewhere(const Plan& plan, TensorArg* k, TensorArg* v) {
  if (plan.total_k > 0) return;
  *k = *v = {reinterpret_cast<char*>(const_cast<int32_t*>(plan.last_key)), 0, 0, 0, INT_MAX};
}

struct BackwardPieces {
  BackwardArgs device;
  void* index_scratch = nullptr;
};

// dq: the kernel of dQ.
BackwardPieces carve_backward(const SelectedAttentionBackward& args, const Instance* dq, Carver& carver) {
  const SelectedAttentionProblem& p = args.problem;
  BackwardPieces pieces = {};
  BackwardArgs& a = pieces.device;
  const TilePlan tiles = carve_tiles(p, dq, carver);
  a.plan = tiles.plan;
  a.unions = tiles.unions;
  carve_stats(args, carver, a);
  if (wants_keys(args)) {
    a.index = carve_index(p, a.plan, carver, &pieces.index_scratch);
    a.partials = carver.take<float>(a.index.max_partials * p.block_size * (p.head_dim_qk + p.head_dim_v));
  }
  return pieces;
}

Status run_keys(const SelectedAttentionBackward& args, const Gpu& gpu, const BackwardPieces& pieces) {
  const SelectedAttentionProblem& p = args.problem;
  const BackwardArgs& a = pieces.device;
  const Instance* kernel;
  Status status = find(p, gpu, Operation::selected_dkdv, &kernel);
  if (status.ok() && a.index.num_lists > 0) {
    status = make_index(a.plan, a.index, pieces.index_scratch, args.stream);
    if (status.ok()) status = kernel->backward(a, gpu.launch);
    if (status.ok()) {
      status = add_partials(p.dtype, a, static_cast<int>(p.head_dim_qk), static_cast<int>(p.head_dim_v), args.stream);
    }
  }
  if (status.ok()) status = clear_dead_keys(p, a, args.stream);
  return status;
}

}  // namespace

Status workspace_bytes(const SelectedAttentionForward& args, std::size_t* bytes) {
  Carver carver(nullptr);
  carve_tiles(args.problem, find_if_possible(args.problem, Operation::selected_forward), carver);
  *bytes = carver.used();
  return {};
}

Status workspace_bytes(const SelectedAttentionBackward& args, std::size_t* bytes) {
  Carver carver(nullptr);
  carve_backward(args, find_if_possible(args.problem, Operation::selected_dq), carver);
  *bytes = carver.used();
  return {};
}

Status selected_attention(const SelectedAttentionForward& args) {
  const SelectedAttentionProblem& p = args.problem;
  Gpu gpu;
  Status status = query_gpu(args.stream, &gpu);
  const Instance* kernel = nullptr;
  if (status.ok()) status = find(p, gpu, Operation::selected_forward, &kernel);
  Carver carver(args.workspace);
  ForwardArgs a = {};
  if (!status.ok()) return status;
  const TilePlan tiles = carve_tiles(p, kernel, carver);
  a.plan = tiles.plan;
  a.unions = tiles.unions;
  status = check_rows(p, a.plan);
  if (!status.ok() || a.plan.total_q == 0) return status;
  status = make_tiles(p, a.plan, a.unions, args.stream);
  if (!status.ok()) return status;
  set_forward_arguments(args, a);
  point_somewhere(a.plan, &a.k, &a.v);
  return kernel->forward(a, gpu.launch);
}

Status selected_attention(const SelectedAttentionBackward& args) {
  const SelectedAttentionProblem& p = args.problem;
  Gpu gpu;
  Status status = query_gpu(args.stream, &gpu);
  const Instance* dq = nullptr;
  if (status.ok()) status = find(p, gpu, Operation::selected_dq, &dq);
  if (!status.ok()) return status;
  Carver carver(args.workspace);
  BackwardPieces pieces = carve_backward(args, dq, carver);
  BackwardArgs& a = pieces.device;
  status = check_rows(p, a.plan);
  if (!status.ok()) return status;
  set_backward_arguments(args, a);
  status = make_tiles(p, a.plan, a.unions, args.stream);
  if (status.ok()) status = make_stats(args, a);
  if (status.ok() && wants_keys(args)) status = run_keys(args, gpu, pieces);
  point_somewhere(a.plan, &a.k, &a.v);
  if (status.ok() && args.dq.data && a.plan.total_q > 0) status = dq->backward(a, gpu.launch);
  return status;
}

Status kernel_name(const SelectedAttentionProblem& problem, char* name, std::size_t name_bytes) {
  Gpu gpu;
  Status status = query_gpu(nullptr, &gpu);
  const Instance* kernel = nullptr;
  if (status.ok()) status = find(problem, gpu, Operation::selected_forward, &kernel);
  if (status.ok()) std::snprintf(name, name_bytes, "%s", kernel->name);
  return status;
}

int num_compiled_kernels() { return num_instances(); }
const char* compiled_kernel(int index) { return instance(index).name; }

}  // namespace nsa::cuda
