// TMA descriptors. cuTensorMapEncodeTiled is the driver's; it is found at run time, so that the library needs no driver
// to load.
#include "common/tensor_map.h"

#include <cuda_runtime.h>

namespace nsa::cuda {
namespace {

using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                        const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                        CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode* find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode*>(function);
}

// Dims 1 and 2 of a map.
struct MapDim {
  int64_t size, bytes;
  int box;
  int step = 1;
};

Status encode_map(const char* what, const TensorArg& tensor, int dim, const MapDim& first, const MapDim& second,
                  int64_t batches, CUtensorMap* map) {
  static Encode* const encode = find_encode();
  if (!encode) {
    return make_status(StatusCode::kNotSupported, "%s: the driver has no cuTensorMapEncodeTiled; it needs CUDA 12.0",
                       what);
  }
  // Strides of dims of one element are never used, but must be legal.
  const cuuint64_t dims[4] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(first.size),
                              static_cast<cuuint64_t>(second.size), static_cast<cuuint64_t>(batches)};
  const auto stride = [](int64_t bytes, cuuint64_t size) { return static_cast<cuuint64_t>(size > 1 ? bytes : 16); };
  const cuuint64_t strides[3] = {stride(first.bytes, dims[1]), stride(second.bytes, dims[2]),
                                 stride(tensor.batch_bytes, dims[3])};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(first.box * first.step), static_cast<cuuint32_t>(second.box),
                             1};
  const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(first.step), 1, 1};
  const CUresult error = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, tensor.data, dims, strides, box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error == CUDA_SUCCESS) return {};
  return make_status(StatusCode::kNotSupported,
                     "%s: the driver refuses a TMA descriptor (CUresult %d) for head dim %d, sizes %lld and %lld, "
                     "strides %lld and %lld bytes",
                     what, static_cast<int>(error), dim, static_cast<long long>(first.size),
                     static_cast<long long>(second.size), static_cast<long long>(first.bytes),
                     static_cast<long long>(second.bytes));
}

struct BatchRows {
  int64_t per_batch, batches;
};
BatchRows batch_rows(const TensorArg& tensor, int64_t rows) {
  const int64_t per_batch = tensor.rows_per_batch < rows ? tensor.rows_per_batch : rows;
  if (per_batch <= 0) return {1, 1};
  return {per_batch, (rows + per_batch - 1) / per_batch};
}

}  // namespace

Status make_tensor_map(const char* what, const TensorArg& tensor, int64_t rows, int heads, int dim, int box_rows,
                       CUtensorMap* map, int row_step) {
  const BatchRows in = batch_rows(tensor, rows);
  return encode_map(what, tensor, dim, {in.per_batch, tensor.row_bytes, box_rows, row_step},
                    {heads, tensor.head_bytes, 1}, in.batches, map);
}

Status make_group_map(const char* what, const TensorArg& tensor, int64_t rows, int heads, int dim, int group,
                      int box_rows, CUtensorMap* map) {
  const BatchRows in = batch_rows(tensor, rows);
  const int box_heads = group < box_rows ? group : box_rows;
  return encode_map(what, tensor, dim, {heads, tensor.head_bytes, box_heads},
                    {in.per_batch, tensor.row_bytes, box_rows / box_heads}, in.batches, map);
}

}  // namespace nsa::cuda
