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
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, uint32_t leading = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kStride | uint64_t{leading >> 4} << 16 | ((shared & 0x3ffff) >> 4);
}

template <typename Element, int kColumns>
struct Wgmma;

#define NSA_ACC(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])

#define NSA_WGMMA(ELEMENT, TYPE)                                                                           \
  template <>                                                                                              \
  struct Wgmma<ELEMENT, 32> {                                                                              \
    /* d = a b^T (+ d where keep); both in shared memory, rows of 64 elements */                           \
    static __device__ __forceinline__ void rows(float (&d)[4][4], uint64_t a, uint64_t b, int keep) {      \
      asm volatile(                                                                                        \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                                     \
          "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                      \
          " {"                                                                                             \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                           \
          "}, %16, %17, p, 1, 1, 0, 0;\n}"                                                                 \
          : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3)                                                 \
          : "l"(a), "l"(b), "r"(keep));                                                                    \
    }                                                                                                      \
    /* d += a b; a in registers, b transposed in shared memory */                                          \
    static __device__ __forceinline__ void columns(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                             \
                   " {"                                                                                    \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                  \
                   "}, {%16, %17, %18, %19}, %20, 1, 1, 1, 1;"                                             \
                   : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3)                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                  \
    }                                                                                                      \
  };
NSA_WGMMA(__nv_bfloat16, "bf16")
NSA_WGMMA(__half, "f16")
#undef NSA_WGMMA

#define NSA_WGMMA(ELEMENT, TYPE)                                                                                     \
  template <>                                                                                                        \
  struct Wgmma<ELEMENT, 64> {                                                                                        \
    /* d = a b^T (+ d where keep); both in shared memory, rows of 64 elements */                                     \
    static __device__ __forceinline__ void rows(float (&d)[8][4], uint64_t a, uint64_t b, int keep) {                \
      asm volatile(                                                                                                  \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                               \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                \
          " {"                                                                                                       \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "          \
          "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                                    \
          "}, %32, %33, p, 1, 1, 0, 0;\n}"                                                                           \
          : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7)           \
          : "l"(a), "l"(b), "r"(keep));                                                                              \
    }                                                                                                                \
    /* d += a b; a in registers, b transposed in shared memory */                                                    \
    static __device__ __forceinline__ void columns(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {           \
      asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                       \
                   " {"                                                                                              \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                   "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                           \
                   "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                       \
                   : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7)  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    }                                                                                                                \
  };
NSA_WGMMA(__nv_bfloat16, "bf16")
NSA_WGMMA(__half, "f16")
#undef NSA_WGMMA

#define NSA_WGMMA(ELEMENT, TYPE)                                                                                     \
  template <>                                                                                                        \
  struct Wgmma<ELEMENT, 128> {                                                                                       \
    /* d = a b^T (+ d where keep); both in shared memory, rows of 64 elements */                                     \
    static __device__ __forceinline__ void rows(float (&d)[16][4], uint64_t a, uint64_t b, int keep) {               \
      asm volatile(                                                                                                  \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                               \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                               \
          " {"                                                                                                       \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "          \
          "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "          \
          "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "          \
          "%59, %60, %61, %62, %63"                                                                                  \
          "}, %64, %65, p, 1, 1, 0, 0;\n}"                                                                           \
          : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7),          \
            NSA_ACC(8), NSA_ACC(9), NSA_ACC(10), NSA_ACC(11), NSA_ACC(12), NSA_ACC(13), NSA_ACC(14), NSA_ACC(15)     \
          : "l"(a), "l"(b), "r"(keep));                                                                              \
    }                                                                                                                \
    /* d += a b; a in registers, b transposed in shared memory */                                                    \
    static __device__ __forceinline__ void columns(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {          \
      asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                      \
                   " {"                                                                                              \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                   "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
                   "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
                   "%59, %60, %61, %62, %63"                                                                         \
                   "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                       \
                   : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7), \
                     NSA_ACC(8), NSA_ACC(9), NSA_ACC(10), NSA_ACC(11), NSA_ACC(12), NSA_ACC(13), NSA_ACC(14),        \
                     NSA_ACC(15)                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    }                                                                                                                \
  };
NSA_WGMMA(__nv_bfloat16, "bf16")
NSA_WGMMA(__half, "f16")
#undef NSA_WGMMA

#define NSA_WGMMA(ELEMENT, TYPE)                                                                                     \
  template <>                                                                                                        \
  struct Wgmma<ELEMENT, 192> {                                                                                       \
    /* d = a b^T (+ d where keep); both in shared memory, rows of 64 elements */                                     \
    static __device__ __forceinline__ void rows(float (&d)[24][4], uint64_t a, uint64_t b, int keep) {               \
      asm volatile(                                                                                                  \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"                                                               \
          "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE                                               \
          " {"                                                                                                       \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "          \
          "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "          \
          "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "          \
          "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "          \
          "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"                 \
          "}, %96, %97, p, 1, 1, 0, 0;\n}"                                                                           \
          : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7),          \
            NSA_ACC(8), NSA_ACC(9), NSA_ACC(10), NSA_ACC(11), NSA_ACC(12), NSA_ACC(13), NSA_ACC(14), NSA_ACC(15),    \
            NSA_ACC(16), NSA_ACC(17), NSA_ACC(18), NSA_ACC(19), NSA_ACC(20), NSA_ACC(21), NSA_ACC(22), NSA_ACC(23)   \
          : "l"(a), "l"(b), "r"(keep));                                                                              \
    }                                                                                                                \
    /* d += a b; a in registers, b transposed in shared memory */                                                    \
    static __device__ __forceinline__ void columns(float (&d)[24][4], const uint32_t (&a)[4], uint64_t b) {          \
      asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE                                      \
                   " {"                                                                                              \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                   "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
                   "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
                   "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
                   "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"        \
                   "}, {%96, %97, %98, %99}, %100, 1, 1, 1, 1;"                                                      \
                   : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7), \
                     NSA_ACC(8), NSA_ACC(9), NSA_ACC(10), NSA_ACC(11), NSA_ACC(12), NSA_ACC(13), NSA_ACC(14),        \
                     NSA_ACC(15), NSA_ACC(16), NSA_ACC(17), NSA_ACC(18), NSA_ACC(19), NSA_ACC(20), NSA_ACC(21),      \
                     NSA_ACC(22), NSA_ACC(23)                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    }                                                                                                                \
  };
NSA_WGMMA(__nv_bfloat16, "bf16")
NSA_WGMMA(__half, "f16")
#undef NSA_WGMMA

#define NSA_WGMMA(ELEMENT, TYPE)                                                                                     \
  template <>                                                                                                        \
  struct Wgmma<ELEMENT, 256> {                                                                                       \
    /* d = a b^T (+ d where keep); both in shared memory, rows of 64 elements */                                     \
    static __device__ __forceinline__ void rows(float (&d)[32][4], uint64_t a, uint64_t b, int keep) {               \
      asm volatile(                                                                                                  \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                              \
          "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                               \
          " {"                                                                                                       \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "          \
          "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "          \
          "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "          \
          "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "          \
          "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, "          \
          "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "            \
          "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"                 \
          "}, %128, %129, p, 1, 1, 0, 0;\n}"                                                                         \
          : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7),          \
            NSA_ACC(8), NSA_ACC(9), NSA_ACC(10), NSA_ACC(11), NSA_ACC(12), NSA_ACC(13), NSA_ACC(14), NSA_ACC(15),    \
            NSA_ACC(16), NSA_ACC(17), NSA_ACC(18), NSA_ACC(19), NSA_ACC(20), NSA_ACC(21), NSA_ACC(22), NSA_ACC(23),  \
            NSA_ACC(24), NSA_ACC(25), NSA_ACC(26), NSA_ACC(27), NSA_ACC(28), NSA_ACC(29), NSA_ACC(30), NSA_ACC(31)   \
          : "l"(a), "l"(b), "r"(keep));                                                                              \
    }                                                                                                                \
    /* d += a b; a in registers, b transposed in shared memory */                                                    \
    static __device__ __forceinline__ void columns(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b) {          \
      asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                      \
                   " {"                                                                                              \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                   "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
                   "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
                   "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
                   "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
                   "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "   \
                   "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"        \
                   "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"                                                  \
                   : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7), \
                     NSA_ACC(8), NSA_ACC(9), NSA_ACC(10), NSA_ACC(11), NSA_ACC(12), NSA_ACC(13), NSA_ACC(14),        \
                     NSA_ACC(15), NSA_ACC(16), NSA_ACC(17), NSA_ACC(18), NSA_ACC(19), NSA_ACC(20), NSA_ACC(21),      \
                     NSA_ACC(22), NSA_ACC(23), NSA_ACC(24), NSA_ACC(25), NSA_ACC(26), NSA_ACC(27), NSA_ACC(28),      \
                     NSA_ACC(29), NSA_ACC(30), NSA_ACC(31)                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    }                                                                                                                \
  };
NSA_WGMMA(__nv_bfloat16, "bf16")
NSA_WGMMA(__half, "f16")
#undef NSA_WGMMA

#define NSA_WGMMA(ELEMENT, TYPE)                                                                            \
  template <>                                                                                               \
  struct Wgmma<ELEMENT, 96> {                                                                               \
    /* d = a b^T (+ d where keep); both in shared memory, rows of 64 elements */                            \
    static __device__ __forceinline__ void rows(float (&d)[12][4], uint64_t a, uint64_t b, int keep) {      \
      asm volatile(                                                                                         \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"                                                      \
          "wgmma.mma_async.sync.aligned.m64n96k16.f32." TYPE "." TYPE                                       \
          " {"                                                                                              \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
          "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
          "%40, %41, %42, %43, %44, %45, %46, %47"                                                          \
          "}, %48, %49, p, 1, 1, 0, 0;\n}"                                                                  \
          : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7), \
            NSA_ACC(8), NSA_ACC(9), NSA_ACC(10), NSA_ACC(11)                                                \
          : "l"(a), "l"(b), "r"(keep));                                                                     \
    }                                                                                                       \
  };
NSA_WGMMA(__nv_bfloat16, "bf16")
NSA_WGMMA(__half, "f16")
#undef NSA_WGMMA

#define NSA_WGMMA(ELEMENT, TYPE)                                                                                  \
  template <>                                                                                                     \
  struct Wgmma<ELEMENT, 176> {                                                                                    \
    /* d = a b^T (+ d where keep); both in shared memory, rows of 64 elements */                                  \
    static __device__ __forceinline__ void rows(float (&d)[22][4], uint64_t a, uint64_t b, int keep) {            \
      asm volatile(                                                                                               \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %90, 0;\n"                                                            \
          "wgmma.mma_async.sync.aligned.m64n176k16.f32." TYPE "." TYPE                                            \
          " {"                                                                                                    \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "       \
          "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "       \
          "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "       \
          "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "       \
          "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87"                                                      \
          "}, %88, %89, p, 1, 1, 0, 0;\n}"                                                                        \
          : NSA_ACC(0), NSA_ACC(1), NSA_ACC(2), NSA_ACC(3), NSA_ACC(4), NSA_ACC(5), NSA_ACC(6), NSA_ACC(7),       \
            NSA_ACC(8), NSA_ACC(9), NSA_ACC(10), NSA_ACC(11), NSA_ACC(12), NSA_ACC(13), NSA_ACC(14), NSA_ACC(15), \
            NSA_ACC(16), NSA_ACC(17), NSA_ACC(18), NSA_ACC(19), NSA_ACC(20), NSA_ACC(21)                          \
          : "l"(a), "l"(b), "r"(keep));                                                                           \
    }                                                                                                             \
  };
NSA_WGMMA(__nv_bfloat16, "bf16")
NSA_WGMMA(__half, "f16")
#undef NSA_WGMMA

#undef NSA_ACC

}  // namespace nsa::device
