// What lets one header serve g++ and nvcc.
#pragma once

#if defined(__CUDACC__)
#define FG_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FG_HD inline __attribute__((always_inline))
#else
#define FG_HD inline
#endif
