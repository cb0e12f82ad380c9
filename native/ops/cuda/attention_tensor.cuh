// Attention over a bfloat16 cache by tensor cores: a block brings a chunk's keys and values into shared
// memory at once, the scores of up to 8 heads are one product (keys are the rows, heads the columns), softmax
// and weighted sum are fp32.
#pragma once

#include "ops/cuda/attention.cuh"
#include "ops/cuda/gemv.cuh"

namespace tp::cuda {

static_assert(kAttentionWarps == kGroup);
constexpr int kPad = 32;  // elements behind a key or query row, so that neighbouring rows use other banks

struct TensorRoom {
  int scores, keys, values, bytes;  // offsets in shared memory; the queries come first
};
inline __host__ __device__ TensorRoom tensor_room(int dim, int chunks) {
  TensorRoom r{};
  const int positions = positions_of(dim);
  r.scores = kGroup * (dim + kPad) * 2;
  r.keys = r.scores + 2 * positions * kGroup * 4;
  r.values = r.keys + positions * (dim + kPad) * 2;
  r.bytes = r.values + positions * dim * 2;
  const int meeting = r.keys + kAttentionThreads * 2 * kGroup * 4;  // where keys and values were
  const int joining = kGroup * chunks * 4;
  if (r.bytes < meeting) r.bytes = meeting;
  if (r.bytes < joining) r.bytes = joining;
  return r;
}

__device__ inline void copy_16(void* to, const void* from) { ptx::cp_async_16(shared_address(to), from); }

/// Adds p[j][head] * v[j][2 pair ..] for every `parts`th position; p holds kGroup floats a position.
template <int Heads>
__device__ inline void weighted(float2 (&out)[kGroup], const float* p, const Bf16* v, int dim, int pair,
                                int part, int parts, int count) {
#pragma unroll 4
  for (int j = part; j < count; j += parts) {
    float weights[kGroup];
    *reinterpret_cast<float4*>(weights) = *reinterpret_cast<const float4*>(p + j * kGroup);
    if (Heads > 4)
      *reinterpret_cast<float4*>(weights + 4) = *reinterpret_cast<const float4*>(p + j * kGroup + 4);
    const uint32_t raw = *reinterpret_cast<const uint32_t*>(v + j * dim + 2 * pair);
    const float x = float_of(raw << 16), y = float_of(raw & 0xffff0000u);
#pragma unroll
    for (int head = 0; head < Heads; head++) {
      out[head].x = fused(weights[head], x, out[head].x);
      out[head].y = fused(weights[head], y, out[head].y);
    }
  }
}

__global__ void __launch_bounds__(kAttentionThreads)
    attend_tensor(const __grid_constant__ AttentionParameters p) {
  TP_DYNAMIC_SHARED(char, shared, 1024);
  __shared__ float maximum[kGroup], total[kGroup];
  wait_for_inputs();
  let_next_start();
  const Heads& h = p.args.heads;
  const Sight sight(p);
  const int dim = h.head_dim, heads = sight.heads, row_of_keys = dim + kPad;
  const int capacity = p.args.cache.capacity, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const TensorRoom room = tensor_room(dim, p.chunks);
  auto* const queries = reinterpret_cast<Bf16*>(shared);
  auto* const keys = reinterpret_cast<Bf16*>(shared + room.keys);
  auto* const values = reinterpret_cast<Bf16*>(shared + room.values);
  auto* const scores =
      reinterpret_cast<float*>(shared + room.scores);  // (2 halves of D, position, head), then the weights
  const int64_t cache =
      (static_cast<int64_t>(p.slot[sight.token]) * h.kv_heads + sight.kv_head) * capacity * dim;
  const auto* const k = static_cast<const Bf16*>(p.args.cache.k) + cache;
  const auto* const v = static_cast<const Bf16*>(p.args.cache.v) + cache;
  int done = 0;
#pragma unroll 1
  for (int chunk = blockIdx.x; chunk < sight.visible; chunk += gridDim.x) {
    const int from = sight.from(chunk), count = sight.count(chunk);
    __syncthreads();
    // A warp takes a row; the cache may be a ring.
    const int at = from < capacity ? from : from % capacity;
    const auto bring = [&](Bf16* to, const Bf16* cache_rows, int pitch) {
#pragma unroll 2
      for (int j = warp; j < count; j += kAttentionWarps) {
        const Bf16* const row =
            cache_rows + static_cast<int64_t>(at + j < capacity ? at + j : at + j - capacity) * dim;
#pragma unroll 1
        for (int i = lane * 8; i < dim; i += 256) copy_16(to + j * pitch + i, row + i);
      }
      ptx::cp_async_commit();
    };
    bring(keys, k, row_of_keys);
    bring(values, v, dim);
    if (done == 0) {
      const float* const q =
          p.args.q + (static_cast<int64_t>(sight.token) * h.heads + sight.first_head) * dim;
#pragma unroll 1
      for (int i = lane * 8; i < dim; i += 256) {
        float x[8] = {};
        if (warp < heads) eight(q + warp * dim + i, x);
        *reinterpret_cast<uint4*>(queries + warp * row_of_keys + i) = pack(x);
      }
    }
    ptx::cp_async_wait<1>();
    __syncthreads();

    // A warp takes 16 positions; where there are but four times as many, two warps take a half of the head
    // each.
    const int tiles = p.positions / kTileRows, halves = kAttentionWarps > tiles ? 2 : 1;
    {
      const int row = lane / 4, quarter = lane % 4, tile = warp & (tiles - 1), half = warp >= tiles;
      const int steps = dim / 32, middle = halves == 1 ? steps : (steps + 1) / 2;
      const int first_step = half ? middle : 0, last_step = half ? steps : middle;
      const Bf16* const low = keys + (tile * kTileRows + row) * row_of_keys + quarter * 8;
      const Bf16* const column = queries + row * row_of_keys + quarter * 8;
      float even[4] = {}, odd[4] = {};
      if (tile * kTileRows < count)
#pragma unroll 2
        for (int s = first_step; s < last_step; s++) {
          const uint4 a = *reinterpret_cast<const uint4*>(low + s * 32);
          const uint4 b = *reinterpret_cast<const uint4*>(low + 8 * row_of_keys + s * 32);
          const uint4 x = *reinterpret_cast<const uint4*>(column + s * 32);
          multiply(even, a.x, b.x, a.y, b.y, x.x, x.y);
          multiply(odd, a.z, b.z, a.w, b.w, x.z, x.w);
        }
      float* const to = scores + (half * p.positions + tile * kTileRows + row) * kGroup + 2 * quarter;
      to[0] = even[0] + odd[0], to[1] = even[1] + odd[1];
      to[8 * kGroup] = even[2] + odd[2], to[8 * kGroup + 1] = even[3] + odd[3];
    }
    __syncthreads();
    if (warp < kGroup) {  // a warp takes a head
      const int head = warp;
      constexpr int kPer = 4;  // at most 128 positions
      float s[kPer], max = -INFINITY, sum = 0;
#pragma unroll
      for (int i = 0; i < kPer; i++) {
        const int j = lane + 32 * i;
        s[i] = j < count ? scores[j * kGroup + head] : -INFINITY;
        if (halves == 2 && j < count) s[i] += scores[(p.positions + j) * kGroup + head];
        max = s[i] > max ? s[i] : max;
      }
      max = warp_max(max);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPer; i++) {
        const int j = lane + 32 * i;
        if (j >= count) continue;
        const float weight = exp_f32(s[i] - max);
        sum += weight;
        scores[j * kGroup + head] = weight;
      }
      sum = warp_sum(sum);
      if (lane == 0) maximum[head] = max, total[head] = sum;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();

    const int pairs = dim / 2, parts = kAttentionThreads / pairs;
    int pair = threadIdx.x, part = 0;
#pragma unroll 1
    while (pair >= pairs) pair -= pairs, part++;
    float2 out[kGroup] = {};
    if (part < parts) {
      if (heads <= 2)
        weighted<2>(out, scores, values, dim, pair, part, parts, count);
      else
        weighted<kGroup>(out, scores, values, dim, pair, part, parts, count);
    }
    // The parts meet in their order where the keys were.
    auto* const meeting = reinterpret_cast<float2*>(keys);
    __syncthreads();  // the values may lie there too
    if (part < parts)
#pragma unroll
      for (int head = 0; head < kGroup; head++)
        if (head < heads) meeting[(head * parts + part) * pairs + pair] = out[head];
    __syncthreads();
    const bool alone = sight.visible == 1;
    // Part i takes every parts'th head.
#pragma unroll 1
    for (int head = part < parts ? part : heads; head < heads; head += parts) {
      float2 sum = meeting[head * parts * pairs + pair];
#pragma unroll 1
      for (int i = 1; i < parts; i++) {
        const float2 other = meeting[(head * parts + i) * pairs + pair];
        sum.x += other.x;
        sum.y += other.y;
      }
      if (alone) {
        const float inverse = __frcp_rn(total[head]);
        float* const to = sight.out(p, head) + 2 * pair;
        to[0] = round_to(true, sum.x * inverse);
        to[1] = round_to(true, sum.y * inverse);
      } else {
        float* const to = sight.partial(p, head, chunk);
        if (pair == 0) to[0] = maximum[head], to[1] = total[head];
        *reinterpret_cast<float2*>(to + 2 + 2 * pair) = sum;
      }
    }
    done++;
  }
  if (done == 0 || sight.visible == 1) return;
  if (last_to_arrive(p, sight, done)) {
    join_chunks(p, sight, reinterpret_cast<float*>(shared));
  }
}

}  // namespace tp::cuda
