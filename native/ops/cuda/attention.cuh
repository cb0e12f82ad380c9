// What both attention kernels share: the cut of the cache into chunks, and how the chunks of a query meet.
#pragma once

#include "ops/cuda/block.cuh"

namespace tp::cuda {

constexpr int kAttentionThreads = 256, kAttentionWarps = kAttentionThreads / 32;
constexpr int kGroup = 8;  // query heads of a block, all of one KV head
constexpr int kPositions =
    64;  // of a chunk: position p lies in chunk p / kPositions, whatever the query sees

struct AttentionParameters {
  AttentionArgs args;
  const int* slot;  // of the first token of this launch
  const int* position;
  float* partial;   // (tokens, heads, chunks, 2 + D): maximum, sum of exponentials, unscaled output
  int* arrived;     // (tokens, head blocks): zero before and after
  int chunks;       // that a query can see at most
  int block_heads;  // query heads of a block
  bool bfloat16;
};

/// What one query sees, and the heads of a block.
struct Sight {
  int token, first, last;  // positions
  int first_chunk, visible;
  int kv_head, first_head, heads;

  __device__ explicit Sight(const AttentionParameters& p) {
    const Heads& h = p.args.heads;
    const int group = h.heads / h.kv_heads, blocks_of_kv = (group + p.block_heads - 1) / p.block_heads;
    token = blockIdx.z;
    kv_head = blockIdx.y / blocks_of_kv;
    first_head = kv_head * group + blockIdx.y % blocks_of_kv * p.block_heads;
    heads = min(p.block_heads, (kv_head + 1) * group - first_head);
    last = p.position[token];
    first = h.window > 0 && last >= h.window ? last - h.window + 1 : 0;
    first_chunk = first / kPositions;
    visible = last / kPositions - first_chunk + 1;
  }
  __device__ int from(int chunk) const { return max(first, (first_chunk + chunk) * kPositions); }
  __device__ int count(int chunk) const {
    return min(last + 1, (first_chunk + chunk + 1) * kPositions) - from(chunk);
  }
  /// Maximum, sum of exponentials and unscaled output of one chunk of one head.
  __device__ float* partial(const AttentionParameters& p, int head, int chunk) const {
    const int64_t row = static_cast<int64_t>(token) * p.args.heads.heads + first_head + head;
    return p.partial + (row * p.chunks + chunk) * (p.args.heads.head_dim + 2);
  }
  __device__ float* out(const AttentionParameters& p, int head) const {
    return p.args.attention +
           (static_cast<int64_t>(token) * p.args.heads.heads + first_head + head) * p.args.heads.head_dim;
  }
};

/// Whether this block, which finished `done` chunks, is the last of the query's; then it sees what the others
/// wrote.
__device__ inline bool last_to_arrive(const AttentionParameters& p, const Sight& sight, int done) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* const counter = p.arrived + sight.token * gridDim.y + blockIdx.y;
    last = atomicAdd(counter, done) + done == sight.visible;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

/// Joins the chunks of all heads of the block in their order. `room`: heads * visible floats of shared
/// memory.
__device__ inline void join_chunks(const AttentionParameters& p, const Sight& sight, float* room) {
  __shared__ float total[kGroup];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, visible = sight.visible,
            dim = p.args.heads.head_dim;
#pragma unroll 1
  for (int head = warp; head < sight.heads; head += kAttentionWarps) {
    float max = -INFINITY, sum = 0;
#pragma unroll 1
    for (int c = lane; c < visible; c += 32) {
      const float m = room[head * visible + c] = __ldcg(sight.partial(p, head, c));
      max = m > max ? m : max;
    }
    max = warp_max(max);
#pragma unroll 1
    for (int c = lane; c < visible; c += 32) {
      const float scale = room[head * visible + c] = exp_f32(room[head * visible + c] - max);
      sum = fused(scale, __ldcg(sight.partial(p, head, c) + 1), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) total[head] = sum;
  }
  __syncthreads();
  // A thread keeps its pair of columns from head to head.
  const int pairs = dim / 2, together = kAttentionThreads / pairs;
  int pair = threadIdx.x, head = 0;
  while (pair >= pairs) pair -= pairs, head++;
  if (head >= together) return;
#pragma unroll 1
  for (; head < sight.heads; head += together) {
    const float* from = sight.partial(p, head, 0) + 2 + 2 * pair;
    float2 sum = {0, 0};
#pragma unroll 4
    for (int c = 0; c < visible; c++) {
      const float2 x = __ldcg(reinterpret_cast<const float2*>(from + static_cast<int64_t>(c) * (dim + 2)));
      const float scale = room[head * visible + c];
      sum.x = fused(scale, x.x, sum.x);
      sum.y = fused(scale, x.y, sum.y);
    }
    float* const to = sight.out(p, head) + 2 * pair;
    const float inverse = __frcp_rn(total[head]);
    to[0] = round_to(p.bfloat16, sum.x * inverse);
    to[1] = round_to(p.bfloat16, sum.y * inverse);
  }
}

}  // namespace tp::cuda
