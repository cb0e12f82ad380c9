// What every kernel needs: overlap with its predecessor, and sums over a warp and over a block of 512
// threads, in orders that depend on nothing but the number of elements.
#pragma once

#include "base/ptx.cuh"
#include "base/tree.h"
#include "ops/cuda/cuda.h"

namespace tp::cuda {

constexpr int kThreads = 512, kWarps = kThreads / 32;

/// Blocks until the kernels before this one are done and what they wrote is visible.
__device__ inline void wait_for_inputs() { ptx::griddepcontrol_wait(); }

/// Lets the next kernel start as blocks of this one end.
__device__ inline void let_next_start() { ptx::griddepcontrol_launch_dependents(); }

// Named barriers: 0 is __syncthreads, 1 to 8 are a matrix op's groups.
constexpr int kListed = 14, kBlock = 15;

/// Waits for kThreads threads; a block may have more that do not take part.
__device__ inline void sync_block() { ptx::bar_sync<kBlock, kThreads>(); }

__device__ inline float warp_sum(float x) {
  for (int span = 16; span > 0; span /= 2) x += __shfl_xor_sync(~0u, x, span);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int span = 16; span > 0; span /= 2) {
    const float other = __shfl_xor_sync(~0u, x, span);
    x = other > x ? other : x;
  }
  return x;
}

/// The sum of x over the warp's lanes up to this one.
__device__ inline int sum_up_to_lane(int x) {
  const int lane = threadIdx.x % 32;
  for (int span = 1; span < 32; span *= 2) {
    const int other = __shfl_up_sync(~0u, x, span);
    if (lane >= span) x += other;
  }
  return x;
}

/// Sums of N values over the block; `room` is N * kWarps floats of shared memory. All threads call it and get
/// the sums.
template <int N>
__device__ inline void block_sums(float (&values)[N], float* room) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int n = 0; n < N; n++) {
    values[n] = warp_sum(values[n]);
    if (lane == 0) room[n * kWarps + warp] = values[n];
  }
  sync_block();
  for (int n = 0; n < N; n++) {
    float x = room[n * kWarps + lane % kWarps];
    for (int span = kWarps / 2; span > 0; span /= 2) x += __shfl_xor_sync(~0u, x, span);
    values[n] = x;
  }
  sync_block();
}

__device__ inline float inverse_rms(float squares, int n, float eps) {
  return __frsqrt_rn(__fdividef(squares, static_cast<float>(n)) + eps);
}

/// The next multiple of `to`.
inline __host__ __device__ constexpr int up(int x, int to) { return (x + to - 1) / to * to; }

/// Whole-number division without a divider: exact for numbers below 2^32 / divisor.
struct Divider {
  uint32_t divisor, magic;
  __device__ int of(int x) const {
    return divisor == 1 ? x : static_cast<int>(__umulhi(static_cast<uint32_t>(x), magic));
  }
};
inline Divider divider(int divisor) {
  return {static_cast<uint32_t>(divisor),
          static_cast<uint32_t>((0x100000000ull + divisor - 1) / static_cast<uint64_t>(divisor))};
}

/// Asks for memory that no kernel writes to come near, so that it is there when the inputs are.
__device__ inline void prefetch(const void* memory, int bytes) {
  for (int i = threadIdx.x * 128; i < bytes; i += kThreads * 128)
    ptx::prefetch_l2(static_cast<const char*>(memory) + i);
}

__device__ inline void eight(const float* from, float (&x)[8]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ inline void eight(const Bf16* from, float (&x)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int j = 0; j < 8; j++) x[j] = float_of(j % 2 ? pairs[j / 2] & 0xffff0000u : pairs[j / 2] << 16);
}
__device__ inline float one(float x) { return x; }
__device__ inline float one(Bf16 x) { return to_float(x); }

/// A row of n <= kThreads * 8 * Per elements, spread over the block's registers in pieces of 8: piece i is
/// with thread i % kThreads. Past the end it is zero. Aligned: n is a multiple of 8.
template <int Per, bool Aligned>
struct Row {
  float x[Per][8];

  static __device__ int element(int piece) { return (threadIdx.x + piece * kThreads) * 8; }
  template <class Source>
  __device__ void load(const Source* from, int n) {
#pragma unroll
    for (int p = 0; p < Per; p++) {
#pragma unroll
      for (int j = 0; j < 8; j++) x[p][j] = 0;
      if (Aligned && element(p) < n) eight(from + element(p), x[p]);
      if (!Aligned)
        for (int j = 0; j < 8; j++)
          if (element(p) + j < n) x[p][j] = one(from[element(p) + j]);
    }
  }
  __device__ void store(float* to, int n) const {
#pragma unroll
    for (int p = 0; p < Per; p++) {
      if (Aligned && element(p) < n) {
        reinterpret_cast<float4*>(to + element(p))[0] = make_float4(x[p][0], x[p][1], x[p][2], x[p][3]);
        reinterpret_cast<float4*>(to + element(p))[1] = make_float4(x[p][4], x[p][5], x[p][6], x[p][7]);
      }
      if (!Aligned)
        for (int j = 0; j < 8; j++)
          if (element(p) + j < n) to[element(p) + j] = x[p][j];
    }
  }
  /// x = f(x, elements of other rows).
  template <class Change, class... Others>
  __device__ void change(Change&& f, const Others&... others) {
#pragma unroll
    for (int p = 0; p < Per; p++)
#pragma unroll
      for (int j = 0; j < 8; j++) x[p][j] = f(x[p][j], others.x[p][j]...);
  }
  __device__ float squares() const {
    float sum = 0;
#pragma unroll
    for (int p = 0; p < Per; p++)
#pragma unroll
      for (int j = 0; j < 8; j++) sum = fused(x[p][j], x[p][j], sum);
    return sum;
  }
};
constexpr int kMostRow = 2 * 8 * kThreads;
constexpr int kMostExperts = 1024;

/// Calls launch.template operator()<Per, Aligned>() with what holds rows of n elements.
template <class Launch>
void with_row(int n, Launch&& launch) {
  if (n % 8 != 0)
    launch.template operator()<2, false>();
  else if (n <= 8 * kThreads)
    launch.template operator()<1, true>();
  else
    launch.template operator()<2, true>();
}

}  // namespace tp::cuda
