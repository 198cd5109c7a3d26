// What a TMA load needs to know about a tensor: a descriptor that the driver makes on the host and a kernel takes as a
// __grid_constant__ parameter.
#pragma once

#include <cuda.h>

#include "common/kernel_args.h"

namespace nsa::cuda {

// Boxes of 64 columns x box_rows rows of [rows, heads, dim], rows of all batches numbered through as in TensorArg; in
// shared memory they lie as device::BoxTile (128-byte swizzle). Rows past the tensor's end become zeros.
// Coordinates: {column, row, head, batch}; TensorArg::batch_and_row() gives two of them. row_step: a box takes every
// row_step-th row, up to 8.
Status make_tensor_map(const char* what, const TensorArg& tensor, int64_t rows, int heads, int dim, int box_rows,
                       CUtensorMap* map, int row_step = 1);

// Boxes of 64 columns x box_rows rows (token * group + head of the group) of one group of heads, which holds whole
// tokens or, where the group is larger than the box, a part of one. Coordinates: {column, head, row, batch}.
Status make_group_map(const char* what, const TensorArg& tensor, int64_t rows, int heads, int dim, int group,
                      int box_rows, CUtensorMap* map);

}  // namespace nsa::cuda
