// How functions shared by all translation units are declared. CPU ops are compiled once per instruction set:
// an ordinary inline function could be merged by the linker into the copy that needs AVX-512, so these are
// internal to each unit and always inlined. CUDA compiles the same text for the device.
#pragma once

#ifdef __CUDACC__
#define TP_INLINE static inline __host__ __device__
#else
#define TP_INLINE static inline __attribute__((always_inline))
#endif
