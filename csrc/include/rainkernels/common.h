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
