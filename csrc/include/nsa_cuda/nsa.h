// nsa_cuda: Native Sparse Attention (arXiv 2502.11089), C++ API.
//
// The library computes on memory that the caller owns. It never allocates device memory, never synchronises, never
// throws: every function returns a Status. Sizes and strides are 64-bit and counted in elements.
//
// Dimension letters, the same in code, docs and tests:
//   B batch   Tq, Tk lengths   Hq, Hkv heads   G = Hq / Hkv   Dk head dim of q, k   Dv head dim of v, o
//   l' selection block size    S width of the block list
//   l, d size and stride of the compression kernel   Nc = (Tk - l) / d + 1 compressed keys (0 if Tk < l)
//   w window size   n blocks that selection takes
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define NSA_API
#else
#define NSA_API __attribute__((visibility("default")))
#endif

// The runtime's own definition, repeated so that this header needs no CUDA.
typedef struct CUstream_st* cudaStream_t;

namespace nsa {

enum class Dtype : std::int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };
enum class IndexType : std::int32_t { kInt32, kInt64 };
enum class Device : std::int32_t { kCpu, kCuda };

// Which kernels run. kAuto: the fastest that the device and the shape have.
enum class Backend : std::int32_t { kAuto, kCpu, kSm80, kSm90 };

enum class StatusCode : std::int32_t {
  kOk,
  kInvalidArgument,  // a size, stride or pointer that can't be right; Python: ValueError
  kNotSupported,     // right, but no kernel for it here; Python: NotImplementedError
  kCudaError,        // the CUDA runtime refused; Python: RuntimeError
};

// The message names the argument, what it was and what is allowed.
struct Status {
  StatusCode code = StatusCode::kOk;
  char message[508] = {};
  bool ok() const { return code == StatusCode::kOk; }
};

// [B, T, H, D] or, packed, [total, H, D] (batch_stride ignored). D is contiguous.
// For lse, dlse: [B, T, H], the same without D.
// CUDA: data and every stride of q, k, v, o, dout, dq, dk, dv a multiple of 16 bytes.
struct Tensor {
  void* data = nullptr;
  std::int64_t batch_stride = 0, row_stride = 0, head_stride = 0;
};

// Factors of the branches' outputs, in the order (compressed, selected, window): [B, T, H, 3]; where one branch's are
// meant, [B, T, H] (branch_stride ignored). Any strides.
struct GateTensor {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;  // of its own
  std::int64_t batch_stride = 0, row_stride = 0, head_stride = 0, branch_stride = 0;
};

// Integers [B, Tq, Hkv, S] or, packed, [total_q, Hkv, S]; any strides. For counts entry_stride is ignored.
struct IndexTensor {
  const void* data = nullptr;
  IndexType type = IndexType::kInt32;
  std::int64_t batch_stride = 0, row_stride = 0, head_stride = 0, entry_stride = 0;
};

// What selected attention computes: which shapes, who sees whom.
//
// Batched: seqlen_q = Tq, seqlen_k = Tk, cu_seqlens_* null.
// Packed: seqlen_q = total_q, seqlen_k = total_k, cu_seqlens_* int32 [B + 1] in the device's memory. Values that aren't
// ascending inside [0, total] are repaired (running maximum, clamped); rows outside every sequence are dead.
//
// Query row t of a sequence stands at position p = t + q_offset; without an offset p = t + Tk - Tq of its sequence.
// Row t sees the keys of [j * l', (j + 1) * l') for every valid entry j of its list; causal: those <= p. An entry is
// ignored when it is negative, names a block past the sequence, stands at or past block_counts, or (causal) starts
// after p.
struct SelectedAttentionProblem {
  Device device = Device::kCpu;
  Backend backend = Backend::kAuto;
  Dtype dtype = Dtype::kFloat32;                  // of q, k, v, o and their gradients
  std::int64_t batch = 0;                         // B
  std::int64_t seqlen_q = 0, seqlen_k = 0;        // Tq, Tk; packed: total_q, total_k
  std::int64_t num_heads_q = 0, num_heads_k = 0;  // Hq, Hkv
  std::int64_t head_dim_qk = 0, head_dim_v = 0;   // Dk, Dv
  std::int64_t block_size = 64;                   // l'
  std::int64_t num_indices = 0;                   // S
  bool causal = true;
  double softmax_scale = 0.0;                  // as given; 1 / sqrt(Dk) is the caller's default
  const std::int32_t* cu_seqlens_q = nullptr;  // [B + 1]; both or neither
  const std::int32_t* cu_seqlens_k = nullptr;  // [B + 1]
  const std::int32_t* q_offsets = nullptr;     // [B], or null
  bool has_q_offset = false;                   // q_offset counts (q_offsets null)
  std::int64_t q_offset = 0;
  IndexTensor block_indices;      // [B, Tq, Hkv, S]
  IndexTensor block_counts;       // [B, Tq, Hkv] int32; data null: see block_count
  std::int64_t block_count = -1;  // one count for every row; -1: S
};

// o = softmax(scale q k^T over the visible keys) v; lse = log sum exp of the scaled scores (natural log), -inf on dead
// rows.
struct SelectedAttentionForward {
  SelectedAttentionProblem problem;
  Tensor q, k, v;
  Tensor o;
  Tensor lse;  // float32, float64 for float64 inputs; data null: not wanted
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  cudaStream_t stream = nullptr;  // CUDA
  int num_threads = 0;            // CPU; 0: OpenMP's default. Results don't depend on it.
};

// Gradients of q, k, v from dout = dL/d(gate o) and dlse = dL/dlse; a gate and dlse exclude each other. A null dq, dk,
// dv is skipped; dk and dv come as a pair or one alone.
struct SelectedAttentionBackward {
  SelectedAttentionProblem problem;
  Tensor q, k, v, o, lse;
  Tensor dout;
  Tensor dlse;      // float32 (float64); data null: zero
  Tensor delta;     // [B, Tq, Hq] float32 (float64), sum over Dv of dout o, where the caller has it: o isn't read then
  GateTensor gate;  // [B, Tq, Hq], of any sign; data null: 1
  Tensor dq, dk, dv;
  bool accumulate_dq = false;  // adds to what dq holds, before rounding
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  cudaStream_t stream = nullptr;
  int num_threads = 0;
};

// Bytes of scratch that the call needs, 256-byte aligned. A function of sizes and the current device alone: no device
// memory is read, and tensor pointers only count as null or not. 0 bytes is possible.
NSA_API Status selected_attention_workspace(const SelectedAttentionForward& args, std::size_t* bytes);
NSA_API Status selected_attention_workspace(const SelectedAttentionBackward& args, std::size_t* bytes);

NSA_API Status selected_attention(const SelectedAttentionForward& args);
NSA_API Status selected_attention(const SelectedAttentionBackward& args);

// The kernels that the call would run, e.g. "sm80.selected_forward.bfloat16.128.128"; for tests and reports.
NSA_API Status selected_attention_kernel(const SelectedAttentionProblem& problem, char* name, std::size_t name_bytes);

// A GPU, by what the choice of kernels depends on. An H100 SXM is {90, 132, 232448}.
struct GpuModel {
  std::int32_t compute_capability = 0;  // 10 major + minor; 0: the current device, and the rest is asked of it
  std::int32_t num_sms = 0;
  std::int32_t shared_memory = 0;  // bytes that a CTA may ask for
};

// What a kernel takes at a time.
struct KernelTiles {
  std::int32_t query_rows = 0;  // (token, head of the group) pairs: of a CTA in forward and dQ, of a stage in dK, dV
  std::int32_t keys = 0;        // of a stage in forward and dQ, of a CTA in dK, dV
  std::int32_t stages = 0;
  std::int32_t threads = 0, shared_memory = 0;  // of a CTA; shared_memory in bytes
  std::int32_t ctas = 0;                        // of an SM
};

struct KernelChoice {
  char name[64] = {};  // "sm90.selected_forward.bfloat16.128.128"
  KernelTiles tiles;
};

// What selected attention runs for a problem, in the forward and in a backward with dq, dk and dv.
struct SelectedAttentionChoice {
  KernelChoice forward, dq, dkdv;
  // dK's kernel leaves dS for dQ's in windows of this many q rows (tokens); 0: dQ's computes it again.
  std::int64_t windows = 0, window_rows = 0;
};

// CUDA: a function of sizes, dtype, backend and the GPU alone; no GPU is needed where `gpu` says which. Tensors count
// as contiguous.
NSA_API Status choose_selected_attention(const SelectedAttentionProblem& problem, const GpuModel& gpu,
                                         SelectedAttentionChoice* choice);

// Which run of keys a query at position p sees, clamped to its sequence.
//   kWindow      causal: the w tokens (p - w, p]; otherwise the tokens with |key - p| < w
//   kCompressed  compressed key i stands for the tokens [i d, i d + l); causal: those with i d + l - 1 <= p; otherwise
//                all Nc
enum class RangeMask : std::int32_t { kWindow, kCompressed };

// What range attention computes: every query sees one run of consecutive keys. Both the sliding window and the
// compressed branch are this.
//
// Batched: seqlen_q = Tq, cu_seqlens_* null; seqlen_k = Tk (kWindow), or at least Nc rows behind num_tokens = Tk tokens
// (kCompressed); rows past Nc are never read.
// Packed: seqlen_q = total_q, seqlen_k = rows of k, cu_seqlens_* int32 [B + 1] in the device's memory, both of tokens
// whatever the mask. Values that aren't ascending are repaired (running maximum from 0; those of q, and with kWindow
// those of k, clamped to the rows there are); rows outside every sequence are dead. With kCompressed a sequence of
// length L has (L - l) / d + 1 rows of k (0 if L < l), which follow those of the sequences before it; rows that would
// stand past seqlen_k don't exist.
//
// Query row t of a sequence stands at position p = t + q_offset; without an offset p = t + Tk - Tq of its sequence, Tk
// in tokens.
struct RangeAttentionProblem {
  Device device = Device::kCpu;
  Backend backend = Backend::kAuto;
  Dtype dtype = Dtype::kFloat32;                  // of q, k, v, o and their gradients
  std::int64_t batch = 0;                         // B
  std::int64_t seqlen_q = 0, seqlen_k = 0;        // Tq, rows of k; packed: in total
  std::int64_t num_heads_q = 0, num_heads_k = 0;  // Hq, Hkv
  std::int64_t head_dim_qk = 0, head_dim_v = 0;   // Dk, Dv
  RangeMask mask = RangeMask::kWindow;
  std::int64_t window_size = 0;                     // w >= 1, may be larger than any sequence; kWindow
  std::int64_t kernel_size = 0, kernel_stride = 0;  // l, d; d divides l; kCompressed
  std::int64_t num_tokens = 0;                      // Tk; kCompressed, batched
  bool causal = true;
  double softmax_scale = 0.0;                  // as given; 1 / sqrt(Dk) is the caller's default
  const std::int32_t* cu_seqlens_q = nullptr;  // [B + 1]; both or neither
  const std::int32_t* cu_seqlens_k = nullptr;  // [B + 1], of tokens
  const std::int32_t* q_offsets = nullptr;     // [B], or null
  bool has_q_offset = false;                   // q_offset counts (q_offsets null)
  std::int64_t q_offset = 0;
};

// o = softmax(scale q k^T over the visible keys) v; lse = log sum exp of the scaled scores (natural log), -inf on dead
// rows.
struct RangeAttentionForward {
  RangeAttentionProblem problem;
  Tensor q, k, v;
  Tensor o;
  Tensor lse;  // float32, float64 for float64 inputs; data null: not wanted
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  cudaStream_t stream = nullptr;  // CUDA
  int num_threads = 0;            // CPU; 0: OpenMP's default. Results don't depend on it.
};

// Gradients of q, k, v from dout = dL/d(gate o) and dlse = dL/dlse; a gate and dlse exclude each other. A null dq, dk,
// dv is skipped. Every row of dk and dv is written; those that no query sees become 0.
struct RangeAttentionBackward {
  RangeAttentionProblem problem;
  Tensor q, k, v, o, lse;
  Tensor dout;
  Tensor dlse;      // float32 (float64); data null: zero
  Tensor delta;     // [B, Tq, Hq] float32 (float64), sum over Dv of dout o, where the caller has it: o isn't read then
  GateTensor gate;  // [B, Tq, Hq], of any sign; data null: 1
  Tensor dq, dk, dv;
  bool accumulate_dq = false;  // adds to what dq holds, before rounding
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  cudaStream_t stream = nullptr;
  int num_threads = 0;
};

// The blocks that each query and kv head attends to (eqs. 8-12), from the compressed branch's q, k and lse.
//
// Compressed key i has the mass p_i = exp(scale q k_i - lse), 0 where it isn't visible or lse is -inf. Block j of l'
// tokens has the score sum over m < l'/d, n < l/d of p[(l'/d) j + m - n] (terms outside [0, Nc) are 0), summed over the
// G heads of the group, in an order that doesn't depend on j: equal masses are exact ties.
//
// Candidates are the blocks that start at or before p (causal), or all ceil(Tk / l') blocks. The first init_blocks and
// those in (own - local_blocks, own], own = floor(p / l'), are taken first; then the largest scores, ties to the
// smaller id; topk in all.
struct BlockSelection {
  RangeAttentionProblem problem;  // mask kCompressed; head_dim_v is ignored
  std::int64_t block_size = 64;   // l', a multiple of d
  std::int64_t topk = 16;         // n >= init_blocks + local_blocks
  std::int64_t init_blocks = 1, local_blocks = 2;
  Tensor q, k;                            // k: the compressed keys
  Tensor lse;                             // of range attention over the same keys; float32, float64 for float64 inputs
  std::int32_t* block_indices = nullptr;  // [B, Tq, Hkv, n] or, packed, [total_q, Hkv, n], contiguous: ascending ids,
                                          // local to their sequence, then -1
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  cudaStream_t stream = nullptr;
  int num_threads = 0;
};

NSA_API Status range_attention_workspace(const RangeAttentionForward& args, std::size_t* bytes);
NSA_API Status range_attention_workspace(const RangeAttentionBackward& args, std::size_t* bytes);
NSA_API Status range_attention(const RangeAttentionForward& args);
NSA_API Status range_attention(const RangeAttentionBackward& args);

NSA_API Status block_selection_workspace(const BlockSelection& args, std::size_t* bytes);
NSA_API Status select_blocks(const BlockSelection& args);

// The three branches of NSA, gated and added up (eq. 5). Packed: batch = 1, rows = total_q.
struct GatedSumProblem {
  Device device = Device::kCpu;
  Dtype dtype = Dtype::kFloat32;  // of o, its branches and their gradients; CUDA: bfloat16, float16
  std::int64_t batch = 0;         // B
  std::int64_t rows = 0;          // Tq
  std::int64_t num_heads = 0;     // Hq
  std::int64_t head_dim = 0;      // Dv; CUDA: a multiple of 8
};

// o = sum over branches c of g_c o_c, added in float32 (float64 for float64) and rounded once. An element of a branch
// that is 0 adds 0, whatever its gate holds: so do the dead rows.
struct GatedSumForward {
  GatedSumProblem problem;
  Tensor o_cmp, o_slc, o_win;  // [B, Tq, Hq, Dv]
  GateTensor gates;
  Tensor o;
  cudaStream_t stream = nullptr;
  int num_threads = 0;
};

// dgates_c = sum over Dv of dout o_c. In float32 (float64) it is also the delta of a branch's backward, which with its
// gate takes dout as it is. Where o_c is null, dgates_c isn't written.
struct GatedSumBackward {
  GatedSumProblem problem;
  Tensor dout;
  Tensor o_cmp, o_slc, o_win;
  GateTensor dgates;
  cudaStream_t stream = nullptr;
  int num_threads = 0;
};

// They need no workspace.
NSA_API Status gated_sum(const GatedSumForward& args);
NSA_API Status gated_sum(const GatedSumBackward& args);

// What this build holds. Plain text, static storage.
NSA_API const char* version();
NSA_API bool built_with_cuda();
NSA_API const char* cuda_architectures();  // "80-real;80-virtual", "" without CUDA
NSA_API const char* cuda_toolkit();        // "13.0", "" without CUDA
NSA_API int num_compiled_kernels();
NSA_API const char* compiled_kernel(int index);  // "sm80.selected_forward.bfloat16.128.128"

}  // namespace nsa
