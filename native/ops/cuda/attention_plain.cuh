// Attention for any head size and both cache dtypes: a chunk a block, with plain loads. Slow beside
// attention_tensor.cuh.
#pragma once

#include "ops/cuda/attention.cuh"

namespace tp::cuda {

__device__ inline float element(const float* x) { return *x; }
__device__ inline float element(const Bf16* x) { return to_float(*x); }

__device__ inline float2 two(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ inline float2 two(const Bf16* from) {
  const uint32_t raw = *reinterpret_cast<const uint32_t*>(from);
  return make_float2(float_of(raw << 16), float_of(raw & 0xffff0000u));
}

template <class Element>
__global__ void __launch_bounds__(kAttentionThreads)
    attend_plain(const __grid_constant__ AttentionParameters p) {
  TP_DYNAMIC_SHARED(char, shared, 1024);
  __shared__ float maximum[kGroup], total[kGroup];
  wait_for_inputs();
  let_next_start();
  const Heads& h = p.args.heads;
  const Sight sight(p);
  const int dim = h.head_dim, heads = sight.heads, chunk = blockIdx.x;
  if (chunk >= sight.visible) return;
  const int from = sight.from(chunk), count = sight.count(chunk);
  const int capacity = p.args.cache.capacity, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t cache =
      (static_cast<int64_t>(p.slot[sight.token]) * h.kv_heads + sight.kv_head) * capacity * dim;
  const auto* const k = static_cast<const Element*>(p.args.cache.k) + cache;
  const auto* const v = static_cast<const Element*>(p.args.cache.v) + cache;

  auto* const q = reinterpret_cast<float*>(shared);  // (heads, D)
  float* const score = q + p.block_heads * dim;      // (heads, positions)
  const float* const queries =
      p.args.q + (static_cast<int64_t>(sight.token) * h.heads + sight.first_head) * dim;
  for (int i = threadIdx.x; i < heads * dim; i += kAttentionThreads) q[i] = queries[i];
  __syncthreads();

  // Scores: a warp takes a position, its lanes the elements, for all heads.
  for (int j = warp; j < count; j += kAttentionWarps) {
    const Element* const row = k + static_cast<int64_t>((from + j) % capacity) * dim;
    float dot[kGroup] = {};
    if (dim % 8 == 0) {
      for (int i = lane * 8; i < dim; i += 256) {
        float x[8];
        eight(row + i, x);
#pragma unroll
        for (int head = 0; head < kGroup; head++) {
          if (head >= heads) continue;
          float y[8];
          eight(q + head * dim + i, y);
#pragma unroll
          for (int e = 0; e < 8; e++) dot[head] = fused(x[e], y[e], dot[head]);
        }
      }
    } else {
      for (int i = lane; i < dim; i += 32)
#pragma unroll
        for (int head = 0; head < kGroup; head++)
          if (head < heads) dot[head] = fused(element(row + i), q[head * dim + i], dot[head]);
    }
#pragma unroll
    for (int head = 0; head < kGroup; head++) {
      if (head >= heads) continue;
      const float sum = warp_sum(dot[head]);
      if (lane == 0) score[head * p.positions + j] = sum;
    }
  }
  __syncthreads();

  // Softmax: a warp takes a head.
  for (int head = warp; head < heads; head += kAttentionWarps) {
    float* const s = score + head * p.positions;
    float max = -INFINITY, sum = 0;
    for (int j = lane; j < count; j += 32) max = s[j] > max ? s[j] : max;
    max = warp_max(max);
    for (int j = lane; j < count; j += 32) sum += s[j] = exp_f32(s[j] - max);
    sum = warp_sum(sum);
    if (lane == 0) maximum[head] = max, total[head] = sum;
  }
  __syncthreads();

  // Weighted values: a thread takes two columns, and every `parts`th position.
  const int pairs = dim / 2, parts = kAttentionThreads / pairs;
  const int pair = threadIdx.x % pairs, part = threadIdx.x / pairs;
  float2 out[kGroup] = {};
  if (part < parts) {
#pragma unroll 4
    for (int j = part; j < count; j += parts) {
      const float2 x = two(v + static_cast<int64_t>((from + j) % capacity) * dim + 2 * pair);
#pragma unroll
      for (int head = 0; head < kGroup; head++) {
        if (head >= heads) continue;
        const float weight = score[head * p.positions + j];
        out[head].x = fused(weight, x.x, out[head].x);
        out[head].y = fused(weight, x.y, out[head].y);
      }
    }
  }
  // The parts meet in their order, one head after another, where the queries were.
  auto* const meeting = reinterpret_cast<float2*>(shared);  // (parts, pairs): at most 256 of them
  const bool alone = sight.visible == 1;
  for (int head = 0; head < heads; head++) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kGroup; i++)
      if (i == head && part < parts) meeting[part * pairs + pair] = out[i];
    __syncthreads();
    if (part > 0) continue;
    float2 sum = meeting[pair];
    for (int i = 1; i < parts; i++) {
      const float2 other = meeting[i * pairs + pair];
      sum.x += other.x;
      sum.y += other.y;
    }
    if (alone) {
      float* const to = sight.out(p, head) + 2 * pair;
      to[0] = round_to(p.bfloat16, sum.x * __frcp_rn(total[head]));
      to[1] = round_to(p.bfloat16, sum.y * __frcp_rn(total[head]));
    } else {
      float* const to = sight.partial(p, head, chunk);
      if (pair == 0) to[0] = maximum[head], to[1] = total[head];
      to[2 + 2 * pair] = sum.x;
      to[3 + 2 * pair] = sum.y;
    }
  }
  if (alone) return;
  if (last_to_arrive(p, sight, 1)) join_chunks(p, sight, reinterpret_cast<float*>(shared));
}

}  // namespace tp::cuda
