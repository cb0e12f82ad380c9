// A design for the experts of a few tokens that was published for another engine (vLLM pull request 41379),
// written anew to be measured beside ours; no plan uses it. A block of 256 threads takes 4 output columns of
// one assignment, a thread neighbouring elements of the row; GELU is a kernel of its own; outputs are added
// up by atomics, so they differ from run to run.
#pragma once

#include "base/launch.cuh"
#include "ops/cuda/block.cuh"

namespace tp::cuda {

struct PublishedMoe {
  const float* in;            // (T, H)
  const Bf16* gate_up;        // (E, 2 N, H)
  const Bf16* down;           // (E, H, N)
  const int* route_index;     // (T, K)
  const float* route_weight;  // (T, K)
  float* projected;           // (T, K, 2 N)
  float* act;                 // (T, K, N)
  float* sum;                 // (T, H)
  Bf16* out;                  // (T, H)
  int tokens, top_k, hidden, width;
};

namespace published {

constexpr int kColumns = 4, kThreads = 256;

/// The block's sums of `n` products of each of 4 rows, given to all threads.
__device__ inline void four_dots(float (&dot)[kColumns], const Bf16* rows, const float* x, int n) {
  __shared__ float room[kColumns][kThreads / 32];
  const int each = (n + kThreads - 1) / kThreads, first = threadIdx.x * each, end = min(first + each, n);
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    const Bf16* const row = rows + static_cast<int64_t>(c) * n;
    float sum = 0;
    int i = first;
    if (i < end && i % 2) sum += to_float(row[i]) * x[i], i++;
    for (; i + 1 < end; i += 2) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(row + i);
      sum += float_of(pair << 16) * x[i] + float_of(pair & 0xffff0000u) * x[i + 1];
    }
    if (i < end) sum += to_float(row[i]) * x[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) room[c][threadIdx.x / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    dot[c] = 0;
    for (int w = 0; w < kThreads / 32; w++) dot[c] += room[c][w];
  }
}

__global__ void __launch_bounds__(kThreads) project(PublishedMoe p) {
  const int a = blockIdx.y, first = blockIdx.x * kColumns;
  float dot[kColumns];
  four_dots(dot, p.gate_up + (static_cast<int64_t>(p.route_index[a]) * 2 * p.width + first) * p.hidden,
            p.in + static_cast<int64_t>(a / p.top_k) * p.hidden, p.hidden);
  if (threadIdx.x == 0)
    for (int c = 0; c < kColumns; c++)
      p.projected[static_cast<int64_t>(a) * 2 * p.width + first + c] = dot[c];
}

__global__ void __launch_bounds__(kThreads) activate(PublishedMoe p) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.tokens * p.top_k * p.width) return;
  const float* const row = p.projected + static_cast<int64_t>(i / p.width) * 2 * p.width + i % p.width;
  p.act[i] = gelu_tanh(row[0]) * row[p.width];
}

__global__ void __launch_bounds__(kThreads) accumulate(PublishedMoe p) {
  const int a = blockIdx.y, first = blockIdx.x * kColumns;
  float dot[kColumns];
  four_dots(dot, p.down + (static_cast<int64_t>(p.route_index[a]) * p.hidden + first) * p.width,
            p.act + static_cast<int64_t>(a) * p.width, p.width);
  if (threadIdx.x == 0)
    for (int c = 0; c < kColumns; c++)
      atomicAdd(p.sum + static_cast<int64_t>(a / p.top_k) * p.hidden + first + c, p.route_weight[a] * dot[c]);
}

__global__ void __launch_bounds__(kThreads) finish(PublishedMoe p) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < p.tokens * p.hidden) p.out[i] = to_bf16(p.sum[i]);
}

inline void run(const PublishedMoe& p, cudaStream_t stream) {
  const auto blocks = [](int count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); };
  const auto all = static_cast<unsigned>(p.tokens * p.top_k);
  const auto start = [&](void (*kernel)(PublishedMoe), dim3 grid) {
    check(launch_kernel({.grid = grid, .block = kThreads, .stream = stream}, kernel, p),
          "launching the published kernels");
  };
  start(project, dim3(static_cast<unsigned>(2 * p.width / kColumns), all));
  start(activate, dim3(blocks(p.tokens * p.top_k * p.width)));
  check(cudaMemsetAsync(p.sum, 0, sizeof(float) * static_cast<size_t>(p.tokens * p.hidden), stream),
        "clearing sums");
  start(accumulate, dim3(static_cast<unsigned>(p.hidden / kColumns), all));
  start(finish, dim3(blocks(p.tokens * p.hidden)));
}

}  // namespace published

}  // namespace tp::cuda
