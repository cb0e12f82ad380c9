// The part of CUDA's language and runtime that the kernels use, on the host (simt.h). Found first on the
// include path, in place of the real one.
#pragma once

// Before the words below become macros: standard headers use some of them as names.
#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda.h"
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
/// All blocks run on one host thread, whose thread-local memory is the running block's (shared_memory.cc).
#define __shared__ static thread_local
#define CUDART_VERSION 13000

#define threadIdx (simt::self->thread)
inline simt::Uint3 &blockIdx = simt::block_index, &blockDim = simt::block_dim, &gridDim = simt::grid_dim;

// ---- vectors

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- threads of a warp and of a block

namespace simt {

/// Any value of up to 8 bytes as 64 bits, and back.
template <class T>
uint64_t bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t out = 0;
  std::memcpy(&out, &value, sizeof value);
  return out;
}
template <class T>
T value(uint64_t from) {
  T out;
  std::memcpy(&out, &from, sizeof out);
  return out;
}

}  // namespace simt

inline void __syncthreads() { simt::barrier_wait(0, 0); }
inline void __syncwarp(unsigned mask = ~0u) { simt::collective(simt::Op::syncwarp, mask, 0); }
template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return simt::value<T>(simt::collective(simt::Op::shfl, mask, simt::bits(x), lane));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return simt::value<T>(simt::collective(simt::Op::shfl_xor, mask, simt::bits(x), lanes));
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int lanes) {
  return simt::value<T>(simt::collective(simt::Op::shfl_up, mask, simt::bits(x), lanes));
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int lanes) {
  return simt::value<T>(simt::collective(simt::Op::shfl_down, mask, simt::bits(x), lanes));
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  return static_cast<unsigned>(simt::collective(simt::Op::ballot, mask, x));
}
inline bool __all_sync(unsigned mask, bool x) { return simt::collective(simt::Op::all, mask, x); }
inline bool __any_sync(unsigned mask, bool x) { return simt::collective(simt::Op::any, mask, x); }
/// 32-bit values; signed ones compare as such.
template <class T>
T __reduce_add_sync(unsigned mask, T x) {
  return static_cast<T>(simt::collective(simt::Op::add, mask, static_cast<uint64_t>(int64_t{x})));
}
template <class T>
T __reduce_min_sync(unsigned mask, T x) {
  return static_cast<T>(simt::collective(simt::Op::min, mask, static_cast<uint64_t>(int64_t{x})));
}
template <class T>
T __reduce_max_sync(unsigned mask, T x) {
  return static_cast<T>(simt::collective(simt::Op::max, mask, static_cast<uint64_t>(int64_t{x})));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x) {
  return static_cast<unsigned>(simt::collective(simt::Op::match, mask, simt::bits(x)));
}

// ---- memory

inline uint64_t __cvta_generic_to_shared(const void* p) { return simt::shared_address(p); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T atomicAdd(T* to, std::type_identity_t<T> x) {
  simt::maybe_pause();
  const T before = *to;
  *to = before + x;
  simt::changed();
  return before;
}
template <class T>
T atomicMin(T* to, std::type_identity_t<T> x) {
  simt::maybe_pause();
  const T before = *to;
  if (x < before) *to = x;
  simt::changed();
  return before;
}
inline void __threadfence() { simt::maybe_pause(); }
inline void __threadfence_system() { simt::fence_system(); }
inline void __nanosleep(unsigned) { simt::pause(); }
[[noreturn]] inline void __trap() { simt::fault("the kernel called __trap"); }

// ---- arithmetic

inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline unsigned __float_as_uint(float x) { return simt::value<unsigned>(simt::bits(x)); }
inline float __uint_as_float(unsigned x) { return simt::value<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// ---- the runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorCooperativeLaunchTooLarge = 82,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchFailure = 719,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum {
  cudaStreamNonBlocking = 1,
  cudaEventDisableTiming = 2,
  cudaHostAllocMapped = 2,
  cudaHostAllocPortable = 1
};
enum { cudaIpcMemLazyEnablePeerAccess = 1, cudaSharedmemCarveoutMaxShared = 100, cudaEnableDefault = 0 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaDeviceP2PAttr { cudaDevP2PAttrAccessSupported = 2, cudaDevP2PAttrNativeAtomicSupported = 3 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  int cooperative;
  int programmaticStreamSerializationAllowed;
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

namespace simt {
struct Stream;
struct Event;
struct Graph;
}  // namespace simt
using cudaStream_t = simt::Stream*;
using cudaEvent_t = simt::Event*;
using cudaGraph_t = simt::Graph*;
using cudaGraphExec_t = simt::Graph*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t sharedMemPerBlockOptin;
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxDynamicSharedSizeBytes;
};
struct cudaIpcMemHandle_t {
  char reserved[64];
};

const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int device);
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDriverGetVersion(int*);
cudaError_t cudaDeviceGetPCIBusId(char* text, int room, int device);
cudaError_t cudaDeviceCanAccessPeer(int*, int, int);
cudaError_t cudaDeviceGetP2PAttribute(int*, cudaDeviceP2PAttr, int, int);
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, int flags,
                                             cudaDriverEntryPointQueryResult*);

cudaError_t simt_allocate(void**, size_t bytes);
template <class T>
cudaError_t cudaMalloc(T** memory, size_t bytes) {
  return simt_allocate(reinterpret_cast<void**>(memory), bytes);
}
template <class T>
cudaError_t cudaMallocHost(T** memory, size_t bytes) {
  return simt_allocate(reinterpret_cast<void**>(memory), bytes);
}
template <class T>
cudaError_t cudaHostAlloc(T** memory, size_t bytes, unsigned) {
  return simt_allocate(reinterpret_cast<void**>(memory), bytes);
}
template <class T>
cudaError_t cudaHostGetDevicePointer(T** device, void* host, unsigned) {
  *device = static_cast<T*>(host);
  return cudaSuccess;
}
cudaError_t cudaFree(void*);
cudaError_t cudaFreeHost(void*);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMemset(void*, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void*, int value, size_t bytes, cudaStream_t);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*);
cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned);
cudaError_t cudaIpcCloseMemHandle(void*);
inline cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
cudaError_t cudaGraphDestroy(cudaGraph_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned);
cudaError_t cudaEventCreate(cudaEvent_t*);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t);

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t simt_function_attributes(cudaFuncAttributes*, const void* kernel);
template <class Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, Function* kernel) {
  return simt_function_attributes(out, reinterpret_cast<const void*>(kernel));
}
cudaError_t simt_launch(const cudaLaunchConfig_t*, const void* kernel, std::function<void()> body);
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return simt_launch(config, reinterpret_cast<const void*>(kernel),
                     [kernel, copies = std::tuple<std::remove_const_t<Parameters>...>(arguments...)] {
                       std::apply(kernel, copies);
                     });
}
