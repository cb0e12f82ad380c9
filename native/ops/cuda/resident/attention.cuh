// Norms and RoPE of the heads, the cache, and one query a head over it. The cache is cut into chunks at
// places that follow from the token's position alone; a task is one chunk of one KV head for one token and
// all the query heads that share it, and goes through its chunk tile by tile. Positions of this step come
// from the projections, not from the cache, where each token's own task lays them. Chunks are joined in their
// order, so neither the batch nor timing changes a bit.
#pragma once

#include "ops/cuda/resident/products.cuh"

namespace tp::cuda::resident {

/// Positions of a tile: 16 KB of keys.
inline __host__ __device__ constexpr int tile_of(int head_dim) { return 8192 / head_dim; }

/// What a token sees of a layer's cache.
struct Sight {
  int first, last;  // positions
  int chunk;        // positions of one: as many tiles as keep a long context to kMostChunks
  __device__ Sight(int position, const Heads& h)
      : first(h.window > 0 && position >= h.window ? position - h.window + 1 : 0),
        last(position),
        chunk(tile_of(h.head_dim)) {
    if (h.window > 0) return;
    while (last / chunk >= kMostChunks) chunk *= 2;
  }
  __device__ int first_chunk() const { return first / chunk; }
  __device__ int chunks() const { return last / chunk - first_chunk() + 1; }
};

struct AttentionTask {
  int token, kv_head, chunk, chunks;
};

/// Whether the block that ends a head's last chunk joins them all; else all blocks share that work, after a
/// meeting. The sums are the same.
__device__ __forceinline__ bool joined_at_once(const Heads& h, int chunks) {
  return chunks <= kFewChunks && h.head_dim == kFewChunksDim;
}

/// Task i of the step, or false. Tasks of a token: chunks of KV head 0, of head 1, ...
__device__ __forceinline__ bool task_of(const Context& c, const Heads& h, int i, AttentionTask& task) {
#pragma unroll 1
  for (int t = 0; t < c.tokens; t++) {
    const int chunks = Sight(c.position[t], h).chunks(), tasks = chunks * h.kv_heads;
    if (i < tasks) {
      task = {t, i / chunks, i % chunks, chunks};
      return true;
    }
    i -= tasks;
  }
  return false;
}

/// One head by one warp: a lane holds D / 64 neighbours of the first half and those that RoPE pairs with
/// them.
template <int D>
struct Head {
  static constexpr int kHalf = D / 64;
  float low[kHalf], high[kHalf];

  __device__ void load(const float* from) {
    const int at = threadIdx.x % 32 * kHalf;
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      const float4 a = __ldcg(reinterpret_cast<const float4*>(from + at + i)),
                   b = __ldcg(reinterpret_cast<const float4*>(from + D / 2 + at + i));
      low[i] = a.x, low[i + 1] = a.y, low[i + 2] = a.z, low[i + 3] = a.w;
      high[i] = b.x, high[i + 1] = b.y, high[i + 2] = b.z, high[i + 3] = b.w;
    }
  }
  /// weight null: without.
  __device__ void norm(const Bf16* weight, float eps) {
    const int at = threadIdx.x % 32 * kHalf;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kHalf; i++) sum = fused(low[i], low[i], sum);
#pragma unroll
    for (int i = 0; i < kHalf; i++) sum = fused(high[i], high[i], sum);
    const float inverse = inverse_rms(warp_sum(sum), D, eps);
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      low[i] = rounded(weight ? low[i] * inverse * to_float(weight[at + i]) : low[i] * inverse);
      high[i] = rounded(weight ? high[i] * inverse * to_float(weight[D / 2 + at + i]) : high[i] * inverse);
    }
  }
  __device__ void rope(const float* cosine, const float* sine, int pairs) {
    const int at = threadIdx.x % 32 * kHalf;
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      if (at + i >= pairs) continue;
      const float x = low[i], y = high[i], cos = __ldg(cosine + at + i), sin = __ldg(sine + at + i);
      low[i] = rounded(fused(x, cos, -(y * sin)));
      high[i] = rounded(fused(y, cos, x * sin));
    }
  }
  __device__ void put(Bf16* to) const {
    const int at = threadIdx.x % 32 * kHalf;
#pragma unroll
    for (int i = 0; i < kHalf; i += 2) {
      *reinterpret_cast<uint32_t*>(to + at + i) = to_bf16(low[i]) | static_cast<uint32_t>(to_bf16(low[i + 1]))
                                                                        << 16;
      *reinterpret_cast<uint32_t*>(to + D / 2 + at + i) =
          to_bf16(high[i]) | static_cast<uint32_t>(to_bf16(high[i + 1])) << 16;
    }
  }
};

/// norm(raw), weighted unless `weight` is null, and rotated unless `cosine` is, to shared memory and, unless
/// null, to the cache. By one warp.
template <int D>
__device__ __noinline__ void place_head(const float* raw, const Bf16* weight, const float* cosine,
                                        const float* sine, int pairs, float eps, Bf16* to, Bf16* cache) {
  Head<D> head;
  head.load(raw);
  head.norm(weight, eps);
  if (cosine) head.rope(cosine, sine, pairs);
  head.put(to);
  if (cache) head.put(cache);
}

/// Shared memory of a task, in the room of the activations.
template <int D>
struct AttentionRoom {
  static constexpr int kPositions = tile_of(D);
  static constexpr int kStride = D * 2 + 64;  // of queries and keys: eight rows use all banks
  char query[kMostGroup * kStride];
  char key[kPositions * kStride];
  Bf16 value[kPositions][D];
  float score[kPositions][kMostGroup];  // then probabilities, not yet divided by their sum
  float2 scale[kMostGroup];             // maximum, sum of the tiles so far
  float keep[kMostGroup];               // what the tiles before count for under the new maximum
  float share[kFewChunks][kMostGroup];  // of a chunk in its head's sum
  bool last;                            // no other block has a chunk of the head left
};

/// Joins the few chunks of the heads that share one KV head, by the block that has come last: the tree of
/// join_chunks.
__device__ __forceinline__ void join_at_once(Context& c, const LayerArgs& layer, const AttentionTask& task,
                                             AttentionRoom<kFewChunksDim>& room) {
  constexpr int D = kFewChunksDim;
  static_assert(D == kThreads);  // a thread a dimension
  const Heads& h = layer.attention.heads;
  const int group = h.heads / h.kv_heads;
  const int64_t first = static_cast<int64_t>(task.token) * h.heads + task.kv_head * group;
  if (c.warp < group) {
    const bool there = c.lane < task.chunks;
    const float2 of = there ? __ldcg(c.p.partial_scale + (first + c.warp) * c.p.partial_chunks + c.lane)
                            : make_float2(-INFINITY, 0);
    const float max = warp_max(of.x), share = there ? exp_f32(of.x - max) : 0;
    float weight = fused(share, of.y, 0.0f);
    for (int span = 1; span < kFewChunks; span *= 2) weight += __shfl_xor_sync(~0u, weight, span);
    if (c.lane < kFewChunks) room.share[c.lane][c.warp] = share;
    if (c.lane == 0) room.scale[c.warp].y = weight;
  }
  sync_consumers();
#pragma unroll 1
  for (int head = 0; head < group; head++) {
    const int64_t row = first + head;
    const float* const part = c.p.partial + row * c.p.partial_chunks * D + threadIdx.x;
    float value[kFewChunks];
#pragma unroll
    for (int k = 0; k < kFewChunks; k++) value[k] = k < task.chunks ? __ldcg(part + k * D) : 0;
#pragma unroll
    for (int k = 0; k < kFewChunks; k++) value[k] = fused(room.share[k][head], value[k], 0.0f);
#pragma unroll
    for (int span = 1; span < kFewChunks; span *= 2)
#pragma unroll
      for (int k = 0; k < kFewChunks; k += 2 * span) value[k] += value[k + span];
    c.leave(layer.attention.attention, c.p.activations.attention, row * D + threadIdx.x,
            rounded(value[0] / room.scale[head].y));
  }
}
static_assert(kFewChunks == kWarps);

template <int D>
__device__ __forceinline__ void attend(Context& c, const LayerArgs& layer, const AttentionTask& task,
                                       bool& waited) {
  using Room = AttentionRoom<D>;
  const AttentionArgs& a = layer.attention;
  const QkvArgs& qa = layer.qkv;
  const Heads& h = a.heads;
  const int group = h.heads / h.kv_heads, q_rows = h.heads * D, kv_rows = h.kv_heads * D;
  const int warp = c.warp, own = task.token;
  const Sight sight(c.position[own], h);
  const int chunk_begin = (sight.first_chunk() + task.chunk) * sight.chunk,
            chunk_end = min(chunk_begin + sight.chunk, sight.last + 1);
  auto& room = *reinterpret_cast<Room*>(c.acts);
  const int64_t cache = (static_cast<int64_t>(c.slot[own]) * h.kv_heads + task.kv_head) * a.cache.capacity;
  const auto cached = [&](const void* of, int position) {
    return static_cast<const Bf16*>(of) + (cache + position % a.cache.capacity) * D;
  };
  /// Starts to bring a tile's rows of the cache, a warp a position; those of this step come later.
  const auto bring = [&](void* to, int stride, const void* of, int begin) {
#pragma unroll 1
    for (int i = max(sight.first - begin, 0) + warp; i < min(chunk_end - begin, Room::kPositions);
         i += kWarps) {
      bool of_step = false;
#pragma unroll 1
      for (int t = 0; t < c.tokens; t++) of_step |= c.slot[t] == c.slot[own] && c.position[t] == begin + i;
      if (of_step) continue;
      const Bf16* const row = cached(of, begin + i);
      const uint32_t at = ptx::shared_address(to) + i * stride;
#pragma unroll
      for (int d = c.lane * 8; d < D; d += 256) ptx::cp_async_16(at + d * 2, row + d);
    }
    ptx::cp_async_commit();
  };
  const auto bring_keys = [&](int begin) { bring(room.key, Room::kStride, a.cache.k, begin); };
  const auto bring_values = [&](int begin) { bring(room.value, D * 2, a.cache.v, begin); };

  bring_keys(chunk_begin);
  bring_values(chunk_begin);
  if (c.lane * 64 < D) ptx::prefetch_l2(qa.q_norm + c.lane * 64), ptx::prefetch_l2(qa.k_norm + c.lane * 64);
  if (!waited) c.grid.wait(c.peers);
  c.mark(1);
  waited = true;
  if (warp < group) {
    place_head<D>(qa.q + static_cast<int64_t>(own) * q_rows + (task.kv_head * group + warp) * D, qa.q_norm,
                  qa.cosine + own * h.rotary_pairs, qa.sine + own * h.rotary_pairs, h.rotary_pairs,
                  c.p.dims.eps, reinterpret_cast<Bf16*>(room.query + warp * Room::kStride), nullptr);
  }
  // Values: a thread takes D / 256 neighbouring dimensions of all heads, position by position.
  constexpr int kWide = D / 256;
  float acc[kMostGroup][kWide] = {};
  const int dim = threadIdx.x * kWide;
#pragma unroll 1
  for (int begin = chunk_begin; begin < chunk_end; begin += Room::kPositions) {
    const int from = max(sight.first - begin, 0), to = min(chunk_end - begin, Room::kPositions);  // seen
    const int t = kWarps - 1 - warp;  // the other end of the warps: with few tokens they do not do both
    const int fresh = t < c.tokens && c.slot[t] == c.slot[own] ? c.position[t] - begin : -1;
    if (fresh >= from && fresh < to) {
      const float* const raw = qa.kv + static_cast<int64_t>(t) * 2 * kv_rows + task.kv_head * D;
      const auto cache_of = [&](const void* of) {
        return t == own ? const_cast<Bf16*>(cached(of, begin + fresh)) : nullptr;
      };
      place_head<D>(qa.v_weight ? raw + kv_rows : raw, nullptr, nullptr, nullptr, 0, c.p.dims.eps,
                    room.value[fresh], cache_of(a.cache.v));
      place_head<D>(raw, qa.k_norm, qa.cosine + t * h.rotary_pairs, qa.sine + t * h.rotary_pairs,
                    h.rotary_pairs, c.p.dims.eps, reinterpret_cast<Bf16*>(room.key + fresh * Room::kStride),
                    cache_of(a.cache.k));
    }
    ptx::cp_async_wait<1>();  // the keys; values may still be on their way
    sync_consumers();

    // Scores: a warp takes 8 positions.
    if (warp * 8 < Room::kPositions) {
      float even[4] = {}, odd[4] = {};
      const char* const key = room.key + (warp * 8 + c.column) * Room::kStride + c.quarter * 16;
      const char* const query = room.query + c.column * Room::kStride + c.quarter * 16;
#pragma unroll 4
      for (int i = 0; i < D / 32; i++) {
        const uint4 k = *reinterpret_cast<const uint4*>(key + i * 64);
        uint4 q = make_uint4(0, 0, 0, 0);
        if (c.column < group) q = *reinterpret_cast<const uint4*>(query + i * 64);
        multiply(even, q.x, q.y, k.x, k.y);
        multiply(odd, q.z, q.w, k.z, k.w);
      }
      for (int i = 0; i < 2; i++) {
        const int at = warp * 8 + 2 * c.quarter + i;
        room.score[at][c.column] = at >= from && at < to ? even[i] + odd[i] : -INFINITY;
      }
    }
    sync_consumers();
    bring_keys(begin + Room::kPositions);  // behind the last tile: none
    if (warp < group) {
      const float2 before = begin > chunk_begin ? room.scale[warp] : make_float2(-INFINITY, 0);
      float max = before.x, sum = 0;
#pragma unroll 1
      for (int at = c.lane; at < Room::kPositions; at += 32)
        max = room.score[at][warp] > max ? room.score[at][warp] : max;
      max = warp_max(max);
#pragma unroll 1
      for (int at = c.lane; at < Room::kPositions; at += 32)
        sum += room.score[at][warp] = exp_f32(room.score[at][warp] - max);
      sum = warp_sum(sum);
      const float keep = begin > chunk_begin ? exp_f32(before.x - max) : 0;
      if (c.lane == 0)
        room.scale[warp] = make_float2(max, fused(keep, before.y, sum)), room.keep[warp] = keep;
    }
    ptx::cp_async_wait<1>();  // the values; the next tile's keys may be on their way
    sync_consumers();
    if (begin > chunk_begin)
#pragma unroll
      for (int head = 0; head < kMostGroup; head++)
#pragma unroll
        for (int w = 0; w < kWide; w++) acc[head][w] *= head < group ? room.keep[head] : 0;
#pragma unroll 2
    for (int i = from; i < to; i++) {
      float v[kWide];
#pragma unroll
      for (int w = 0; w < kWide; w++) v[w] = to_float(room.value[i][dim + w]);
      const float4 low = *reinterpret_cast<const float4*>(room.score[i]),
                   high = *reinterpret_cast<const float4*>(room.score[i] + 4);
      const float p[kMostGroup] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int head = 0; head < kMostGroup; head++)
#pragma unroll
        for (int w = 0; w < kWide; w++) acc[head][w] = fused(p[head], v[w], acc[head][w]);
    }
    sync_consumers();
    bring_values(begin + Room::kPositions);
  }

  const int64_t first_row = static_cast<int64_t>(own) * h.heads + task.kv_head * group;
  const int64_t chunks = c.p.partial_chunks;
#pragma unroll
  for (int head = 0; head < kMostGroup; head++) {
    if (head >= group) continue;
    const int64_t row = first_row + head;
    const float sum = room.scale[head].y;
#pragma unroll
    for (int w = 0; w < kWide; w++)
      if (task.chunks > 1)
        c.p.partial[(row * chunks + task.chunk) * D + dim + w] = acc[head][w];
      else
        c.leave(a.attention, c.p.activations.attention, row * D + dim + w, rounded(acc[head][w] / sum));
  }
  if (task.chunks > 1 && warp == 0 && c.lane < group)
    c.p.partial_scale[(first_row + c.lane) * chunks + task.chunk] = room.scale[c.lane];
  if constexpr (D == kFewChunksDim)
    if (task.chunks > 1 && joined_at_once(h, task.chunks)) {
      sync_consumers();
      if (threadIdx.x == 0) {
        uint32_t* const done = c.p.chunks_done + own * h.kv_heads + task.kv_head;
        __threadfence();
        room.last = atomicAdd(done, 1u) == static_cast<uint32_t>(task.chunks) - 1;
        __threadfence();
        if (room.last) *done = 0;  // for the next layer, which begins after all blocks have met
      }
      sync_consumers();
      if (room.last) join_at_once(c, layer, task, room);
    }
  sync_consumers();  // the room is free again
}

/// Joins the chunks of heads that have many: a task is 32 dimensions of one head.
__device__ __forceinline__ void join_chunks(Context& c, const LayerArgs& layer) {
  const Heads& h = layer.attention.heads;
  const int slices = h.head_dim / 32, tasks = c.tokens * h.heads * slices;
  auto* const parts = reinterpret_cast<float2*>(c.acts);  // (8, 32): weighted values, weights
#pragma unroll 1
  for (int i = blockIdx.x; i < tasks; i += gridDim.x) {
    const int row = i / slices, t = row / h.heads, dim = i % slices * 32 + c.lane;
    const int chunks = Sight(c.position[t], h).chunks();
    if (chunks == 1 || joined_at_once(h, chunks)) continue;
    const float2* const scale = c.p.partial_scale + static_cast<int64_t>(row) * c.p.partial_chunks;
    const float* const value =
        c.p.partial + static_cast<int64_t>(row) * c.p.partial_chunks * h.head_dim + dim;
    float max = -INFINITY;
#pragma unroll 1
    for (int k = c.lane; k < chunks; k += 32) {
      const float x = __ldcg(&scale[k].x);
      max = x > max ? x : max;
    }
    max = warp_max(max);
    float weighted = 0, weight = 0;
#pragma unroll 4
    for (int k = c.warp; k < chunks; k += kWarps) {
      const float2 of = __ldcg(scale + k);
      const float share = exp_f32(of.x - max);
      weighted = fused(share, __ldcg(value + static_cast<int64_t>(k) * h.head_dim), weighted);
      weight = fused(share, of.y, weight);
    }
    parts[c.warp * 32 + c.lane] = make_float2(weighted, weight);
    sync_consumers();
    if (c.warp == 0) {
      float values[kWarps], weights[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; w++)
        values[w] = parts[w * 32 + c.lane].x, weights[w] = parts[w * 32 + c.lane].y;
#pragma unroll
      for (int span = 1; span < kWarps; span *= 2)
#pragma unroll
        for (int w = 0; w < kWarps; w += 2 * span)
          values[w] += values[w + span], weights[w] += weights[w + span];
      c.leave(layer.attention.attention, c.p.activations.attention,
              static_cast<int64_t>(row) * h.head_dim + dim, rounded(values[0] / weights[0]));
    }
    sync_consumers();
  }
}

__device__ __forceinline__ void attention(Context& c, const LayerArgs& layer) {
  const Heads& h = layer.attention.heads;
  bool waited = false;
  AttentionTask task;
#pragma unroll 1
  for (int i = blockIdx.x; task_of(c, h, i, task); i += gridDim.x) {
    if (h.head_dim == 256)
      attend<256>(c, layer, task, waited);
    else
      attend<512>(c, layer, task, waited);
  }
  if (!waited)
    c.grid.wait(c.peers);  // blocks without a task must not arrive again before all have arrived once
  bool many = false;
#pragma unroll 1
  for (int t = 0; t < c.tokens; t++) {
    const int chunks = Sight(c.position[t], h).chunks();
    many |= chunks > 1 && !joined_at_once(h, chunks);
  }
  c.grid.arrive();
  c.grid.expect(gridDim.x);
  if (!many) return;
  c.grid.wait(c.peers);
  join_chunks(c, layer);
  c.grid.arrive();
  c.grid.expect(gridDim.x);
}

}  // namespace tp::cuda::resident
