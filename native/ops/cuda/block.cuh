// What every kernel needs: overlap with its predecessor, and sums over a warp and over a block of 512
// threads, in orders that depend on nothing but the number of elements.
#pragma once

#include "base/tree.h"
#include "ops/cuda/cuda.h"

namespace tp::cuda {

constexpr int kThreads = 512, kWarps = kThreads / 32;

/// Blocks until the kernels before this one are done and what they wrote is visible.
__device__ inline void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/// Lets the next kernel start as blocks of this one end.
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

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

/// Sums of N values over the block; `room` is N * kWarps floats of shared memory. All threads call it and get
/// the sums.
template <int N>
__device__ inline void block_sums(float (&values)[N], float* room) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int n = 0; n < N; n++) {
    values[n] = warp_sum(values[n]);
    if (lane == 0) room[n * kWarps + warp] = values[n];
  }
  __syncthreads();
  for (int n = 0; n < N; n++) {
    float x = room[n * kWarps + lane % kWarps];
    for (int span = kWarps / 2; span > 0; span /= 2) x += __shfl_xor_sync(~0u, x, span);
    values[n] = x;
  }
  __syncthreads();
}

__device__ inline float inverse_rms(float squares, int n, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(n) + eps);
}

/// Asks for memory that no kernel writes to come near, so that it is there when the inputs are.
__device__ inline void prefetch(const void* memory, int bytes) {
  for (int i = threadIdx.x * 128; i < bytes; i += kThreads * 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(memory) + i));
}

/// A row of n <= kThreads * Per elements, spread over the block's registers: element i is with thread i %
/// kThreads.
template <int Per>
struct Row {
  float x[Per];

  template <class Source>
  __device__ void load(const Source* from, int n) {
#pragma unroll
    for (int j = 0; j < Per; j++) x[j] = index(j) < n ? number(from[index(j)]) : 0;
  }
  __device__ static int index(int j) { return threadIdx.x + j * kThreads; }
  __device__ float squares() const {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < Per; j++) sum = fused(x[j], x[j], sum);
    return sum;
  }

 private:
  __device__ static float number(float value) { return value; }
  __device__ static float number(Bf16 value) { return to_float(value); }
};
constexpr int kMostRow = 8192;

/// Calls launch.template operator()<Per>() with a Per that holds rows of n elements.
template <class Launch>
void with_row(int n, Launch&& launch) {
  if (n <= 6 * kThreads)
    launch.template operator()<6>();
  else
    launch.template operator()<kMostRow / kThreads>();
}

}  // namespace tp::cuda
