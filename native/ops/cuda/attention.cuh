// What both attention kernels share: the cut of the cache into chunks, and how the chunks of a query meet.
#pragma once

#include "ops/cuda/block.cuh"

namespace tp::cuda {

constexpr int kAttentionThreads = 256, kAttentionWarps = kAttentionThreads / 32;
constexpr int kGroup = 8;  // query heads of a block, all of one KV head

/// Positions of a chunk: position p lies in chunk p / positions, whatever the query sees.
inline __host__ __device__ int positions_of(int head_dim) { return head_dim <= 256 ? 128 : 64; }

struct AttentionParameters {
  AttentionArgs args;
  const int* slot;  // of the first token of this launch
  const int* position;
  float* partial;   // (tokens, heads, chunks, 2 + D): maximum, sum of exponentials, unscaled output
  int* arrived;     // (tokens, head blocks): zero before and after
  int positions;    // of a chunk, a power of two
  int chunks;       // that a query can see at most
  int block_heads;  // query heads of a block
  int group;        // query heads of a KV head
  Divider blocks_of_kv;
  bool bfloat16;
};

/// What one query sees, and the heads of a block.
struct Sight {
  int token, first, last;  // positions
  int first_chunk, visible, positions;
  int kv_head, first_head, heads;

  __device__ explicit Sight(const AttentionParameters& p) {
    const Heads& h = p.args.heads;
    token = blockIdx.z;
    const int at = p.position[token];
    kv_head = p.blocks_of_kv.of(blockIdx.y);
    first_head =
        kv_head * p.group + (blockIdx.y - kv_head * static_cast<int>(p.blocks_of_kv.divisor)) * p.block_heads;
    heads = min(p.block_heads, (kv_head + 1) * p.group - first_head);
    last = at;
    first = h.window > 0 && last >= h.window ? last - h.window + 1 : 0;
    positions = p.positions;
    const int shift = __ffs(positions) - 1;
    first_chunk = first >> shift;
    visible = (last >> shift) - first_chunk + 1;
  }
  __device__ int from(int chunk) const { return max(first, (first_chunk + chunk) * positions); }
  __device__ int count(int chunk) const {
    return min(last + 1, (first_chunk + chunk + 1) * positions) - from(chunk);
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
    float max = -INFINITY, sum = 0, first_total = 0;
#pragma unroll 1
    for (int c = lane; c < visible; c += 32) {
      const float2 both = __ldcg(reinterpret_cast<const float2*>(sight.partial(p, head, c)));
      room[head * visible + c] = both.x;
      if (c < 32) first_total = both.y;
      max = both.x > max ? both.x : max;
    }
    max = warp_max(max);
#pragma unroll 1
    for (int c = lane; c < visible; c += 32) {
      const float scale = room[head * visible + c] = exp_f32(room[head * visible + c] - max);
      sum = fused(scale, c < 32 ? first_total : __ldcg(sight.partial(p, head, c) + 1), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) total[head] = sum;
  }
  __syncthreads();
  // A thread keeps its pair of columns from head to head, and asks for four heads at a time.
  constexpr int kAtOnce = 4;
  const int pairs = dim / 2, together = kAttentionThreads / pairs;
  int pair = threadIdx.x, first_head = 0;
  while (pair >= pairs) pair -= pairs, first_head++;
  if (first_head >= together) return;
#pragma unroll 1
  for (; first_head < sight.heads; first_head += kAtOnce * together) {
    float2 sum[kAtOnce] = {};
#pragma unroll 2
    for (int c = 0; c < visible; c++) {
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int head = first_head + i * together;
        if (head >= sight.heads) continue;
        const float2 x = __ldcg(reinterpret_cast<const float2*>(sight.partial(p, head, c) + 2 + 2 * pair));
        const float scale = room[head * visible + c];
        sum[i].x = fused(scale, x.x, sum[i].x);
        sum[i].y = fused(scale, x.y, sum[i].y);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int head = first_head + i * together;
      if (head >= sight.heads) continue;
      float* const to = sight.out(p, head) + 2 * pair;
      const float inverse = __frcp_rn(total[head]);
      to[0] = round_to(p.bfloat16, sum[i].x * inverse);
      to[1] = round_to(p.bfloat16, sum[i].y * inverse);
    }
  }
}

}  // namespace tp::cuda
