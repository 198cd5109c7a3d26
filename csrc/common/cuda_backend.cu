// From validated arguments to launches: picks the kernels, lays out the workspace, runs the steps in order.
#include "common/cuda_backend.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>

#include "common/dispatch.h"
#include "common/integers.h"
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

Status check_gpu(const Gpu& gpu) {
  if (gpu.major >= 8) return {};
  return make_status(StatusCode::kNotSupported,
                     "the GPU has compute capability %d.%d; the CUDA kernels need 8.0 (Ampere) or newer", gpu.major,
                     gpu.minor);
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
  return error == cudaSuccess ? check_gpu(*gpu) : cuda_status(error, "asking for the GPU's properties");
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

// Whether the Hopper kernels run where there are any. They work on 64 keys at a time, most of which a smaller block
// would leave empty. Times in ms at 16K tokens, 64 / 4 heads, D 128, one H100, Hopper against mma.sync, neighbours that
// agree and that don't, in an earlier state of both:
//   forward   1.33 : 1.80, 2.31 : 3.12
//   backward  4.4 : 7.9, 4.7 : 9.0
// Forward and dQ each need the unions first, 0.03 to 0.05 ms.
bool forward_uses_sm90(const SelectedAttentionProblem& p) {
  return p.backend == Backend::kSm90 || (p.backend != Backend::kSm80 && p.block_size >= 64);
}
bool backward_uses_sm90(const SelectedAttentionProblem& p) {
  return p.backend != Backend::kSm80 && p.block_size >= 64;  // smaller blocks it couldn't do at all
}

Status find_forward(const SelectedAttentionProblem& p, const Gpu& gpu, const Instance** found) {
  return find_kernel({p.backend, p.dtype, p.head_dim_qk, p.head_dim_v}, gpu, Operation::selected_forward,
                     forward_uses_sm90(p), found);
}

struct TilePlan {
  Plan plan;
  TileUnions unions;
};

// kernel: whose tiles the plan is for. Those of the sm80 family walk the lists themselves.
TilePlan carve_tiles(const SelectedAttentionProblem& p, const Instance* kernel, Carver& carver) {
  const bool unions = kernel && kernel->family == Backend::kSm90;
  const bool forward = kernel && kernel->operation == Operation::selected_forward;
  TilePlan tiles = {carve_plan(p, carver, unions && forward ? 4 : 1), {}};  // wgmma multiplies four units
  if (unions) {
    const TileSize size =
        forward ? sm90::selected_forward::tile_size(kernel->dv) : sm90::selected_dq::tile_size(kernel->dk);
    tiles.unions = carve_unions(p, tiles.plan, size, !forward, carver);
  }
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

// The inverted index numbers the entries of a span's rows and one kv head as int.
Status check_entries(const Plan& plan, const InvertedIndex& index) {
  const int64_t rows = std::min(plan.total_q, index.span_rows);
  if (rows * plan.list_width < 1 << 30) return {};
  return make_status(StatusCode::kNotSupported,
                     "block_indices has %d entries a row; the CUDA backward takes fewer than 2^30 in %lld rows",
                     plan.list_width, static_cast<long long>(rows));
}

// Without keys nothing is read, but addresses are still formed.
void point_somewhere(const Plan& plan, TensorArg* k, TensorArg* v) {
  if (plan.total_k > 0) return;
  *k = *v = {reinterpret_cast<char*>(const_cast<int32_t*>(plan.last_key)), 0, 0, 0, INT_MAX};
}

// The two kernels of a backward. The Hopper ones share dS: dK's leaves it for dQ's.
struct BackwardKernels {
  const Instance *dq = nullptr, *dkdv = nullptr;
  bool share_ds() const { return dq && dkdv && dq->family == Backend::kSm90; }
};

Status find_kernels(const SelectedAttentionProblem& p, const Gpu& gpu, BackwardKernels* kernels) {
  const KernelRequest request = {p.backend, p.dtype, p.head_dim_qk, p.head_dim_v};
  const auto find_both = [&](bool uses_sm90) {
    const Status status = find_kernel(request, gpu, Operation::selected_dkdv, uses_sm90, &kernels->dkdv);
    return status.ok() ? find_kernel(request, gpu, Operation::selected_dq, uses_sm90, &kernels->dq) : status;
  };
  const Status status = find_both(backward_uses_sm90(p));
  // a build that holds one of the Hopper kernels only
  return status.ok() && kernels->dq->family != kernels->dkdv->family ? find_both(false) : status;
}

// dS of a window takes about 1 GiB, or as much as kMinWindow q rows or the kMaxWindows-th part of all need: in more
// windows a block's list of a window would have less than S l' / 16 entries, 64 of usual sizes. At 64K tokens (64 / 4
// heads, 16 blocks of 64) that is 8192 rows; backward in ms, uniform / clustered: all at once (8.6 GB) 21.1 / 18.9,
// 16384 rows 22.0 / 19.3, 8192 21.5 / 19.2, 4096 22.4 / 19.8, 2048 28.6 / 23.9.
constexpr int64_t kMaxDsBytes = int64_t{1} << 30;
constexpr int64_t kMinWindow = 256, kMaxWindows = 16;

Windows choose_windows(const SelectedAttentionProblem& p, const Plan& plan, int tile_warps, bool shares_ds) {
  Windows windows = {1, std::max(plan.total_q, 1), 1};
  const int64_t row_bytes = 2 * p.num_heads_q * plan.list_width * plan.block_size;  // dS of a q row
  if (!shares_ds || plan.total_q * row_bytes <= kMaxDsBytes) return windows;
  // Where rows fill their tiles without a break, windows end where tiles do.
  const int64_t group = p.num_heads_q / p.num_heads_k, tile_rows = 16 * tile_warps;
  const int64_t step = tile_rows / std::gcd(tile_rows, group);
  windows.buffers = plan.units.runs == 1 ? 1 : 2;
  const int64_t least = std::max(kMinWindow, divide_up(plan.total_q, kMaxWindows));
  const int64_t count = divide_up(plan.total_q, std::max(kMaxDsBytes / row_bytes / windows.buffers, least));
  const int64_t rows = divide_up(divide_up(plan.total_q, count), step) * step;  // even ones: a rest is a launch as well
  windows.rows = static_cast<int>(std::min<int64_t>(rows, plan.total_q));
  windows.count = static_cast<int>(divide_up(plan.total_q, windows.rows));
  if (windows.count == 1) windows.buffers = 1;
  return windows;
}

struct BackwardPieces {
  BackwardArgs device;
  void* index_scratch = nullptr;
};

BackwardPieces carve_backward(const SelectedAttentionBackward& args, const BackwardKernels& kernels, Carver& carver) {
  const SelectedAttentionProblem& p = args.problem;
  BackwardPieces pieces = {};
  BackwardArgs& a = pieces.device;
  const TilePlan tiles = carve_tiles(p, kernels.dq, carver);
  a.plan = tiles.plan;
  a.unions = tiles.unions;
  carve_stats(args, carver, a);
  const bool shares_ds = kernels.share_ds() && args.dq.data;
  if (!wants_keys(args) && !shares_ds) return pieces;
  const Windows windows = choose_windows(p, a.plan, a.unions.warps, shares_ds);
  a.index = carve_index(p, a.plan, windows, shares_ds, carver, &pieces.index_scratch);
  const int64_t dims = p.head_dim_qk + p.head_dim_v;
  a.partials = carver.take<float>(a.index.max_partials * p.block_size * dims);
  if (windows.count > 1 && wants_keys(args)) a.sums = carver.take<float>(a.plan.total_k * p.num_heads_k * dims);
  if (shares_ds) {
    a.ds_rows = static_cast<int64_t>(windows.buffers) * windows.rows * a.plan.list_width * p.num_heads_q;
    a.ds = carver.take<char>(2 * a.ds_rows * a.plan.block_size);
  }
  return pieces;
}

// dK and dV, and dQ where it comes from dK's dS, window after window.
Status run_windows(const SelectedAttentionBackward& args, const Gpu& gpu, const BackwardKernels& kernels,
                   BackwardArgs& a, void* index_scratch) {
  const SelectedAttentionProblem& p = args.problem;
  const int dk = static_cast<int>(p.head_dim_qk), dv = static_cast<int>(p.head_dim_v);
  Status status = make_index(a.plan, a.index, a.num_heads_k, index_scratch, args.stream);
  if (status.ok() && a.sums) status = clear_sums(a, dk, dv, args.stream);
  for (a.index.window = 0; a.index.window < a.index.windows.count && status.ok(); ++a.index.window) {
    if (a.index.window_lists > 0) {
      status = kernels.dkdv->backward(a, gpu.launch);
      if (status.ok()) status = add_partials(p.dtype, a, dk, dv, args.stream);
    }
    if (status.ok() && a.ds && a.plan.total_q > 0) status = kernels.dq->backward(a, gpu.launch);
  }
  if (status.ok() && a.sums) status = round_sums(p.dtype, a, dk, dv, args.stream);
  return status;
}

}  // namespace

Status workspace_bytes(const SelectedAttentionForward& args, std::size_t* bytes) {
  Carver carver(nullptr);
  Gpu gpu;
  const Instance* kernel = nullptr;  // where none is found the call will say why
  if (query_gpu(nullptr, &gpu).ok()) find_forward(args.problem, gpu, &kernel);
  carve_tiles(args.problem, kernel, carver);
  *bytes = carver.used();
  return {};
}

Status workspace_bytes(const SelectedAttentionBackward& args, std::size_t* bytes) {
  Carver carver(nullptr);
  Gpu gpu;
  BackwardKernels kernels;
  if (query_gpu(nullptr, &gpu).ok()) find_kernels(args.problem, gpu, &kernels);
  carve_backward(args, kernels, carver);
  *bytes = carver.used();
  return {};
}

Status selected_attention(const SelectedAttentionForward& args) {
  const SelectedAttentionProblem& p = args.problem;
  Gpu gpu;
  Status status = query_gpu(args.stream, &gpu);
  const Instance* kernel = nullptr;
  if (status.ok()) status = find_forward(p, gpu, &kernel);
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
  BackwardKernels kernels;
  if (status.ok()) status = find_kernels(p, gpu, &kernels);
  if (!status.ok()) return status;
  Carver carver(args.workspace);
  BackwardPieces pieces = carve_backward(args, kernels, carver);
  BackwardArgs& a = pieces.device;
  status = check_rows(p, a.plan);
  if (status.ok() && a.index.windows.count > 0) status = check_entries(a.plan, a.index);
  if (!status.ok()) return status;
  set_backward_arguments(args, a);
  status = make_tiles(p, a.plan, a.unions, args.stream);
  if (status.ok()) status = make_stats(args, a);
  point_somewhere(a.plan, &a.k, &a.v);
  if (status.ok() && a.index.windows.count > 0) status = run_windows(args, gpu, kernels, a, pieces.index_scratch);
  if (status.ok() && wants_keys(args)) status = clear_dead_keys(p, a, args.stream);
  if (status.ok() && args.dq.data && !a.ds && a.plan.total_q > 0) status = kernels.dq->backward(a, gpu.launch);
  return status;
}

Status kernel_name(const SelectedAttentionProblem& problem, char* name, std::size_t name_bytes) {
  Gpu gpu;
  Status status = query_gpu(nullptr, &gpu);
  const Instance* kernel = nullptr;
  if (status.ok()) status = find_forward(problem, gpu, &kernel);
  if (status.ok()) std::snprintf(name, name_bytes, "%s", kernel->name);
  return status;
}

Status choose_kernels(const SelectedAttentionProblem& p, const GpuModel& model, SelectedAttentionChoice* choice) {
  Gpu gpu = {
      {model.shared_memory, model.num_sms, nullptr}, model.compute_capability / 10, model.compute_capability % 10};
  Status status = model.compute_capability ? check_gpu(gpu) : query_gpu(nullptr, &gpu);
  const Instance* forward = nullptr;
  BackwardKernels backward;
  if (status.ok()) status = find_forward(p, gpu, &forward);
  if (status.ok()) status = find_kernels(p, gpu, &backward);
  if (!status.ok()) return status;
  const auto set = [&](const Instance& kernel, KernelChoice* chosen) {
    std::snprintf(chosen->name, sizeof(chosen->name), "%s", kernel.name);
    chosen->tiles = kernel.tiles(gpu.launch, static_cast<int>(p.num_heads_q / p.num_heads_k));
  };
  *choice = {};
  set(*forward, &choice->forward);
  set(*backward.dq, &choice->dq);
  set(*backward.dkdv, &choice->dkdv);
  if (!backward.share_ds()) return status;
  Carver carver(nullptr);
  const TilePlan tiles = carve_tiles(p, backward.dq, carver);
  const Windows windows = choose_windows(p, tiles.plan, tiles.unions.warps, true);
  choice->windows = windows.count;
  choice->window_rows = windows.rows;
  return status;
}

int num_compiled_kernels() { return num_instances(); }
const char* compiled_kernel(int index) { return instance(index).name; }

}  // namespace nsa::cuda
