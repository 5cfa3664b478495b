// Shared by g++ and nvcc: marks functions that run on both sides. No torch, no CUDA runtime calls.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RK_HOST_DEVICE __host__ __device__
#define RK_INLINE __host__ __device__ __forceinline__
#else
#define RK_HOST_DEVICE
#define RK_INLINE inline
#endif

#if defined(_MSC_VER)
#define RK_RESTRICT __restrict
#else
#define RK_RESTRICT __restrict__
#endif

// Internal linkage: the same function is compiled for several instruction sets, and the linker must not pick one for
// all.
#define RK_LOCAL static RK_INLINE
#if defined(__GNUC__)
#define RK_ALWAYS __attribute__((always_inline))
#else
#define RK_ALWAYS
#endif
