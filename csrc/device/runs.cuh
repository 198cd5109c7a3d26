// Runs of rows: sequences, and in packed calls the rows before the first and behind the last one.
#pragma once

#include <cstdint>

namespace nsa::device {

// The last run with begin[run] <= place, of an ascending table [runs + 1]; `runs` where place lies past them all.
__device__ __forceinline__ int find_run(const int32_t* begin, int runs, int place) {
  int low = 0, high = runs + 1;  // first run with begin > place
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(begin + middle) > place)
      high = middle;
    else
      low = middle + 1;
  }
  return low - 1;
}

}  // namespace nsa::device
