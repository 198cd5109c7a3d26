// wgmma, the matrix product of four warps that reads its operands from shared memory: one macro makes the instructions
// of a size.
//
// Accumulators of m64nN: as in device/tile.cuh, acc[n][4] for every 8 columns; warp w of the four holds rows 16 w .. 16
// w + 15.
#pragma once

#include "device/ptx.cuh"

namespace nsa::device {

// Before the first wgmma that uses registers written by ordinary instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Makes shared memory that ordinary stores or cp.async wrote, and a barrier published, visible to wgmma.
__device__ __forceinline__ void fence_shared_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Keeps the compiler from moving uses of an accumulator across wgmma_wait.
template <int kCount>
__device__ __forceinline__ void hold(float (&acc)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[n][i])::"memory");
  }
}

// Shared-memory matrix of rows of 64 elements (128 bytes, 128-byte swizzle), 8 rows every 1024 bytes. Bytes of
// `leading` part two such columns of boxes; it only counts for a transposed operand.
__device__ __forceinline__ uint32_t low_descriptor(uint32_t shared, uint32_t leading) {
  return leading >> 4 << 16 | ((shared & 0x3ffff) >> 4);
}
__device__ __forceinline__ uint64_t whole_descriptor(uint32_t low) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kStride | low;
}
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, uint32_t leading = 16) {
  return whole_descriptor(low_descriptor(shared, leading));
}

// m64nNk16, fp32 accumulators:
//   rows(d, a, b, keep)   d = a b^T (+ d where keep); both in shared memory, rows of 64 elements
//   columns(d, a, b)      d += a b; a in registers, b transposed in shared memory
template <typename Element, int kColumns>
struct Wgmma;

// The operands of 8, 16, .. columns: their numbers in the instruction, and the registers behind them.
#define NSA_NUMBERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NSA_NUMBERS_48 NSA_NUMBERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NSA_NUMBERS_64 \
  NSA_NUMBERS_32       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NSA_NUMBERS_96 \
  NSA_NUMBERS_64       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NSA_NUMBERS_128 \
  NSA_NUMBERS_96        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NSA_NUMBERS_176                                                                                    \
  NSA_NUMBERS_128                                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87"
#define NSA_NUMBERS_192 \
  NSA_NUMBERS_176       \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NSA_NUMBERS_256                                                                                  \
  NSA_NUMBERS_192                                                                                        \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define NSA_ACC(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define NSA_ACCS_32 NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3)
#define NSA_ACCS_48 NSA_ACCS_32, NSA_ACC(4), NSA_ACC(5)
#define NSA_ACCS_64 NSA_ACCS_32, NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7)
#define NSA_ACCS_96 NSA_ACCS_64, NSA_ACC(8), NSA_ACC(9), NSA_ACC(10), NSA_ACC(11)
#define NSA_ACCS_128 NSA_ACCS_96, NSA_ACC(12), NSA_ACC(13), NSA_ACC(14), NSA_ACC(15)
#define NSA_ACCS_176 NSA_ACCS_128, NSA_ACC(16), NSA_ACC(17), NSA_ACC(18), NSA_ACC(19), NSA_ACC(20), NSA_ACC(21)
#define NSA_ACCS_192 NSA_ACCS_176, NSA_ACC(22), NSA_ACC(23)
#define NSA_ACCS_256 \
  NSA_ACCS_192, NSA_ACC(24), NSA_ACC(25), NSA_ACC(26), NSA_ACC(27), NSA_ACC(28), NSA_ACC(29), NSA_ACC(30), NSA_ACC(31)

// The numbers of what follows the N / 2 accumulators: I0 = N / 2, I1 = N / 2 + 1, ...
#define NSA_WGMMA(ELEMENT, TYPE, N, I0, I1, I2, I3, I4)                                                        \
  template <>                                                                                                  \
  struct Wgmma<ELEMENT, N> {                                                                                   \
    static __device__ __forceinline__ void rows(float (&d)[N / 8][4], uint64_t a, uint64_t b, int keep) {      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                                    \
                   ", 0;\n"                                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NSA_NUMBERS_##N        \
                   "}, %" #I0 ", %" #I1 ", p, 1, 1, 0, 0;\n}"                                                  \
                   : NSA_ACCS_##N                                                                              \
                   : "l"(a), "l"(b), "r"(keep));                                                               \
    }                                                                                                          \
    static __device__ __forceinline__ void columns(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NSA_NUMBERS_##N        \
                   "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", 1, 1, 1, 1;"                        \
                   : NSA_ACCS_##N                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                      \
    }                                                                                                          \
  };
#define NSA_WGMMA_BOTH(...)                     \
  NSA_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__) \
  NSA_WGMMA(__half, "f16", __VA_ARGS__)

NSA_WGMMA_BOTH(32, 16, 17, 18, 19, 20)
NSA_WGMMA_BOTH(48, 24, 25, 26, 27, 28)
NSA_WGMMA_BOTH(64, 32, 33, 34, 35, 36)
NSA_WGMMA_BOTH(96, 48, 49, 50, 51, 52)
NSA_WGMMA_BOTH(128, 64, 65, 66, 67, 68)
NSA_WGMMA_BOTH(176, 88, 89, 90, 91, 92)
NSA_WGMMA_BOTH(192, 96, 97, 98, 99, 100)
NSA_WGMMA_BOTH(256, 128, 129, 130, 131, 132)

#undef NSA_WGMMA_BOTH
#undef NSA_WGMMA
#undef NSA_ACCS_32
#undef NSA_ACCS_48
#undef NSA_ACCS_64
#undef NSA_ACCS_96
#undef NSA_ACCS_128
#undef NSA_ACCS_176
#undef NSA_ACCS_192
#undef NSA_ACCS_256
#undef NSA_ACC
#undef NSA_NUMBERS_32
#undef NSA_NUMBERS_48
#undef NSA_NUMBERS_64
#undef NSA_NUMBERS_96
#undef NSA_NUMBERS_128
#undef NSA_NUMBERS_176
#undef NSA_NUMBERS_192
#undef NSA_NUMBERS_256

}  // namespace nsa::device
