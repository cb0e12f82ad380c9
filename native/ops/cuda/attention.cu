// One query a head over the cache. The cache is cut at fixed positions into chunks; a block takes one chunk for up to 8
// query heads of one KV head. A query that sees one chunk is done then; else the block that finishes last joins the chunks
// in their order. So neither the batch nor timing changes a bit.
#include "ops/cuda/block.cuh"

namespace tp::cuda {

namespace {

constexpr int kAttentionThreads = 256, kAttentionWarps = kAttentionThreads / 32;
constexpr int kGroup = 8;  // query heads of a block

struct AttentionParameters {
  AttentionArgs args;
  const int* slot;      // of the first token of this launch
  const int* position;
  float* partial;       // (tokens, heads, chunks, 2 + D): maximum, sum of exponentials, unscaled output
  int* arrived;         // (tokens, head blocks): zero before and after
  int chunk, chunks;    // positions of a chunk; chunks that a query can see at most
  int head_blocks, block_heads;
  bool bfloat16;
};

__device__ inline float element(const float* x) { return *x; }
__device__ inline float element(const Bf16* x) { return to_float(*x); }

/// Eight neighbours.
__device__ inline void eight(const float* from, float (&x)[8]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ inline void eight(const Bf16* from, float (&x)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = float_of(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
}
__device__ inline float2 two(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ inline float2 two(const Bf16* from) {
  const uint32_t raw = *reinterpret_cast<const uint32_t*>(from);
  return make_float2(float_of(raw << 16), float_of(raw & 0xffff0000u));
}

template <class Element>
__global__ void __launch_bounds__(kAttentionThreads) attend(const __grid_constant__ AttentionParameters p) {
  extern __shared__ float4 shared[];
  __shared__ float maximum[kGroup], total[kGroup];
  __shared__ bool last_one;
  wait_for_inputs();
  let_next_start();
  const Heads& h = p.args.heads;
  const int dim = h.head_dim, group = h.heads / h.kv_heads;
  const int t = blockIdx.z, head_block = blockIdx.y;
  const int blocks_of_kv = (group + p.block_heads - 1) / p.block_heads;
  const int kv_head = head_block / blocks_of_kv, first_head = kv_head * group + head_block % blocks_of_kv * p.block_heads;
  const int heads = min(p.block_heads, (kv_head + 1) * group - first_head);
  const int last = p.position[t], first = h.window > 0 && last >= h.window ? last - h.window + 1 : 0;
  const int first_chunk = first / p.chunk, visible = last / p.chunk - first_chunk + 1;
  if (static_cast<int>(blockIdx.x) >= visible) return;
  const int from = max(first, (first_chunk + static_cast<int>(blockIdx.x)) * p.chunk);
  const int count = min(last + 1, (first_chunk + static_cast<int>(blockIdx.x) + 1) * p.chunk) - from;
  const int capacity = p.args.cache.capacity, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t cache = (static_cast<int64_t>(p.slot[t]) * h.kv_heads + kv_head) * capacity * dim;
  const auto* const k = static_cast<const Element*>(p.args.cache.k) + cache;
  const auto* const v = static_cast<const Element*>(p.args.cache.v) + cache;

  auto* const q = reinterpret_cast<float*>(shared);  // (heads, D)
  float* const score = q + p.block_heads * dim;      // (heads, chunk)
  const float* const queries = p.args.q + (static_cast<int64_t>(t) * h.heads + first_head) * dim;
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
      if (lane == 0) score[head * p.chunk + j] = sum;
    }
  }
  __syncthreads();

  // Softmax: a warp takes a head.
  for (int head = warp; head < heads; head += kAttentionWarps) {
    float* const s = score + head * p.chunk;
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
        const float weight = score[head * p.chunk + j];
        out[head].x = fused(weight, x.x, out[head].x);
        out[head].y = fused(weight, x.y, out[head].y);
      }
    }
  }
  // The parts meet in their order, one head after another, where the queries were.
  auto* const meeting = reinterpret_cast<float2*>(shared);  // (parts, pairs): at most 256 of them
  const bool alone = visible == 1;
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
    const int64_t row = static_cast<int64_t>(t) * h.heads + first_head + head;
    if (alone) {
      float* const to = p.args.attention + row * dim + 2 * pair;
      to[0] = round_to(p.bfloat16, sum.x / total[head]);
      to[1] = round_to(p.bfloat16, sum.y / total[head]);
    } else {
      float* const to = p.partial + (row * p.chunks + blockIdx.x) * (dim + 2);
      if (pair == 0) to[0] = maximum[head], to[1] = total[head];
      to[2 + 2 * pair] = sum.x;
      to[3 + 2 * pair] = sum.y;
    }
  }
  if (alone) return;

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* const counter = p.arrived + t * gridDim.y + head_block;
    last_one = atomicAdd(counter, 1) == visible - 1;
    if (last_one) *counter = 0;
  }
  __syncthreads();
  if (!last_one) return;
  __threadfence();
  for (int head = 0; head < heads; head++) {
    const int64_t row = static_cast<int64_t>(t) * h.heads + first_head + head;
    const float* const parts_of_row = p.partial + row * p.chunks * (dim + 2);
    float max = -INFINITY;
    for (int c = 0; c < visible; c++) {
      const float m = __ldcg(parts_of_row + static_cast<int64_t>(c) * (dim + 2));
      max = m > max ? m : max;
    }
    for (int i = threadIdx.x; i < dim; i += kAttentionThreads) {
      float sum = 0, all = 0;
      for (int c = 0; c < visible; c++) {
        const float* const one = parts_of_row + static_cast<int64_t>(c) * (dim + 2);
        const float scale = exp_f32(__ldcg(one) - max);
        all = fused(scale, __ldcg(one + 1), all);
        sum = fused(scale, __ldcg(one + 2 + i), sum);
      }
      p.args.attention[row * dim + i] = round_to(p.bfloat16, sum / all);
    }
  }
}

}  // namespace

void attention(const AttentionArgs& a, const Dims& d, const Input& in, Backend& backend) {
  CudaBackend& cuda = of(backend);
  const Heads& h = a.heads;
  const int group = h.heads / h.kv_heads;
  AttentionParameters p{};
  p.args = a;
  p.chunk = h.window > 0 ? 128 : 256;
  const int visible = h.window > 0 && h.window < a.cache.capacity ? h.window : a.cache.capacity;
  p.chunks = (visible + p.chunk - 2) / p.chunk + 1;  // the first and the last may be cut
  p.block_heads = group < kGroup ? group : kGroup;
  p.head_blocks = h.kv_heads * ((group + p.block_heads - 1) / p.block_heads);
  p.bfloat16 = d.bfloat16;
  p.arrived = static_cast<int*>(cuda.workspace("attention arrivals", sizeof(int) * kChunk * p.head_blocks));
  p.partial = static_cast<float*>(
      cuda.workspace("attention", sizeof(float) * kChunk * h.heads * p.chunks * (h.head_dim + size_t{2})));
  // Queries and scores, then the meeting of the parts.
  const size_t need = sizeof(float) * p.block_heads * (h.head_dim + p.chunk), meeting = sizeof(float2) * kAttentionThreads;
  for (int first = 0; first < in.tokens; first += kChunk) {
    const int tokens = in.tokens - first < kChunk ? in.tokens - first : kChunk;
    p.slot = in.slot + first;
    p.position = in.position + first;
    p.args.q = a.q + static_cast<int64_t>(first) * h.heads * h.head_dim;
    p.args.attention = a.attention + static_cast<int64_t>(first) * h.heads * h.head_dim;
    const dim3 grid(static_cast<unsigned>(p.chunks), static_cast<unsigned>(p.head_blocks), static_cast<unsigned>(tokens));
    const size_t shared = need > meeting ? need : meeting;
    if (d.bfloat16)
      cuda.launch(attend<Bf16>, grid, kAttentionThreads, shared, p);
    else
      cuda.launch(attend<float>, grid, kAttentionThreads, shared, p);
  }
}

}  // namespace tp::cuda
