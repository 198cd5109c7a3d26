// Device code around cu_seqlens: repairing them, laying units of rows over them, and finding a row's sequence.
#pragma once

#include <cub/block/block_scan.cuh>

#include "common/plan.h"

namespace nsa::cuda {

inline constexpr int kSequenceThreads = 256;

// The sequence that holds `row`: the last b with begin[b] <= row; batch where row lies past them all, -1 before them.
__device__ inline int find_sequence(const int32_t* begin, int batch, int row) {
  int low = 0, high = batch + 1;  // first b with begin[b] > row
  while (low < high) {
    const int middle = (low + high) / 2;
    if (begin[middle] > row)
      high = middle;
    else
      low = middle + 1;
  }
  return low - 1;
}

// What one CTA of kSequenceThreads does with tables of sequences; all of its threads call each function.
class SequenceScan {
 public:
  using Scan = cub::BlockScan<int, kSequenceThreads>;

  __device__ explicit SequenceScan(Scan::TempStorage& storage) : storage_(storage) {}

  // out[b] = running maximum of cu clamped to [0, total], b <= batch
  __device__ void repair(const int32_t* cu, int32_t* out, int batch, int total) {
    int carry = 0;
    for (int base = 0; base <= batch; base += kSequenceThreads) {
      const int i = base + threadIdx.x;
      int value = i <= batch ? min(max(cu[i], 0), total) : 0;
      int running, highest;
      Scan(storage_).InclusiveScan(value, running, Max{}, highest);
      __syncthreads();
      if (i <= batch) out[i] = max(running, carry);
      carry = max(carry, highest);
    }
    __syncthreads();
  }

  // out[i] = sum of count(0 .. i - 1), i <= n
  template <typename Count>
  __device__ void sum_before(int n, int32_t* out, Count count) {
    int carry = 0;
    for (int base = 0; base <= n; base += kSequenceThreads) {
      const int i = base + threadIdx.x;
      int before, sum;
      Scan(storage_).ExclusiveSum(i < n ? count(i) : 0, before, sum);
      __syncthreads();
      if (i <= n) out[i] = carry + before;
      carry += sum;
    }
    __syncthreads();
  }

  // Where a sequence's compressed keys begin, given where its tokens do; nothing past `total`, the rows there are.
  template <typename Size>
  __device__ void lay_compressed_keys(const int32_t* token_begin, int batch, Size kernel_size, Size kernel_stride,
                                      int total, int32_t* key_begin) {
    sum_before(batch, key_begin, [&](int b) {
      const int tokens = token_begin[b + 1] - token_begin[b];
      return tokens < kernel_size ? 0 : static_cast<int>((tokens - kernel_size) / kernel_stride) + 1;
    });
    for (int b = threadIdx.x; b <= batch; b += kSequenceThreads) key_begin[b] = min(key_begin[b], total);
  }

  // Runs of rows: those before the first sequence, the sequences, those behind the last one.
  __device__ void lay_runs(const int32_t* begin, int batch, int total, int32_t* token_begin) {
    for (int run = threadIdx.x; run <= batch + 2; run += kSequenceThreads)
      token_begin[run] = run == 0 ? 0 : run == batch + 2 ? total : begin[run - 1];
    __syncthreads();
  }

  // Runs, and their units of 16 rows (Units).
  __device__ void lay_units(const int32_t* begin, int batch, int total, int group, int alignment, int32_t* token_begin,
                            int32_t* unit_begin) {
    lay_runs(begin, batch, total, token_begin);
    const int rows = 16 * alignment;
    sum_before(batch + 2, unit_begin, [&](int run) {
      return ((token_begin[run + 1] - token_begin[run]) * group + rows - 1) / rows * alignment;
    });
  }

 private:
  struct Max {
    __device__ int operator()(int a, int b) const { return a > b ? a : b; }
  };
  Scan::TempStorage& storage_;
};

}  // namespace nsa::cuda
