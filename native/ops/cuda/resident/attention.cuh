// Norms and RoPE of the heads, the cache, and one query a head over it. A block goes through its tasks tile
// by tile: keys and values of a tile are two slots of the ring. Positions of this step come from the
// projections, as soon as these are there, and not from the cache, where each token's own task lays them.
// Chunks are joined in their order, so neither the batch nor timing changes a bit.
#pragma once

#include <type_traits>

#include "ops/cuda/resident/weighted.cuh"

namespace TP_RESIDENT {

/// One head by one warp: a lane holds D / 64 neighbours of the first half and those that RoPE pairs with
/// them. What does not depend on the step's stages can be asked for ahead.
template <int D>
struct Head {
  static constexpr int kHalf = D / 64;
  uint2 weight[2][kHalf / 4];
  float4 cos[kHalf / 4], sin[kHalf / 4];

  /// `norm` null: without weight; `cosine` null: without RoPE. Times one and zero they change no bit.
  __device__ __forceinline__ void ask(const Bf16* norm, const float* cosine, const float* sine, int pairs) {
    const int at = threadIdx.x % 32 * kHalf;
    const bool turns = cosine && at < pairs;
#pragma unroll
    for (int i = 0; i < kHalf / 4; i++) {
      weight[0][i] = weight[1][i] = make_uint2(0x3f803f80u, 0x3f803f80u);
      if (norm)
        weight[0][i] = ptx::ld_global_nc_v2(norm + at + i * 4),
        weight[1][i] = ptx::ld_global_nc_v2(norm + D / 2 + at + i * 4);
      cos[i] = make_float4(1, 1, 1, 1), sin[i] = make_float4(0, 0, 0, 0);
      if (turns)
        cos[i] = __ldg(reinterpret_cast<const float4*>(cosine + at) + i),
        sin[i] = __ldg(reinterpret_cast<const float4*>(sine + at) + i);
    }
  }
  /// norm(raw), as soon as it is there, rotated, to shared memory and, unless null, to the cache.
  __device__ __forceinline__ void place(const float* raw, const PeerMemory& peers, float eps, Bf16* to,
                                        Bf16* cache) const {
    const int at = threadIdx.x % 32 * kHalf;
    float4 x[2][kHalf / 4];
    float sum = 0;
    for (Timeout timeout;; timeout.poll(peers, kTimeoutNs)) {
      bool there = true;
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < kHalf / 4; i++) {
          const uint4 four = ptx::ld_relaxed_gpu_v4(raw + half * (D / 2) + at + i * 4);
          there &= four.x != kNothing && four.y != kNothing && four.z != kNothing && four.w != kNothing;
          x[half][i] = make_float4(float_of(four.x), float_of(four.y), float_of(four.z), float_of(four.w));
        }
      if (__all_sync(~0u, there)) break;
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < kHalf / 4; i++) {
        const float4 v = x[half][i];
        sum = fused(v.w, v.w, fused(v.z, v.z, fused(v.y, v.y, fused(v.x, v.x, sum))));
      }
    const float inverse = inverse_rms_of<D>(warp_sum(sum), eps);
    const auto normed = [&](float v, uint32_t w) { return rounded(v * inverse * float_of(w)); };
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < kHalf / 4; i++) {
        float4& v = x[half][i];
        const uint2 w = weight[half][i];
        v = make_float4(normed(v.x, w.x << 16), normed(v.y, w.x & 0xffff0000u), normed(v.z, w.y << 16),
                        normed(v.w, w.y & 0xffff0000u));
      }
#pragma unroll
    for (int i = 0; i < kHalf / 4; i++) {
      const float4 a = x[0][i], b = x[1][i], co = cos[i], si = sin[i];
      const uint2 low = make_uint2(
                      ptx::cvt_rn_bf16x2(fused(a.x, co.x, -(b.x * si.x)), fused(a.y, co.y, -(b.y * si.y))),
                      ptx::cvt_rn_bf16x2(fused(a.z, co.z, -(b.z * si.z)), fused(a.w, co.w, -(b.w * si.w)))),
                  high = make_uint2(
                      ptx::cvt_rn_bf16x2(fused(b.x, co.x, a.x * si.x), fused(b.y, co.y, a.y * si.y)),
                      ptx::cvt_rn_bf16x2(fused(b.z, co.z, a.z * si.z), fused(b.w, co.w, a.w * si.w)));
      reinterpret_cast<uint2*>(to + at)[i] = low, reinterpret_cast<uint2*>(to + D / 2 + at)[i] = high;
      if (!cache) continue;
      reinterpret_cast<uint2*>(cache + at)[i] = low, reinterpret_cast<uint2*>(cache + D / 2 + at)[i] = high;
    }
  }
};

template <int D>
using Weighted = std::conditional_t<most_group(D) == 2, FewHeads<D>, ManyHeads<D>>;

/// Shared memory of a task, in the room of the activations.
template <int D>
struct AttentionRoom {
  static constexpr int kStride = D * 2 + 64;  // of queries: eight rows use all banks
  typename TileShape<D>::Scores scores[2];    // tiles take turns
  char query[most_group(D) * kStride];        // they outlast a task: its neighbour may have the same
  typename Weighted<D>::Room weighted;
  float share[kWarps][kFewChunks];  // of a chunk in its head's sum, where chunks are joined
  bool last;                        // no other block has a chunk of the head left
};

/// Four neighbours of the output, as Context::leave(). `contract` null: the launch goes on.
__device__ __forceinline__ void leave_four(float* contract, Bf16* out, int64_t at, float4 x) {
  if (contract)
    *reinterpret_cast<float4*>(contract + at) =
        make_float4(rounded(x.x), rounded(x.y), rounded(x.z), rounded(x.w));
  else
    put_four(out, at, x);
}

/// Joins the few chunks of a head, `row` of (T, heads), by the block that has come last: each of the warps
/// that share a head has neighbouring dimensions. `shares`: kFewChunks floats of the warp. Out of line: few
/// blocks come here.
template <int D>
__device__ __noinline__ void join_at_once(const Tasks& tasks, float* contract, int row, int chunks, int part,
                                          float* shares) {
  // A few at a time: more at once would be more code, and most sequences have few chunks.
  constexpr int kDims = D * most_group(D) / kWarps, kSlices = (kDims + 127) / 128;
  constexpr int kAtOnce = kSlices > 1 ? 2 : 4;
  static_assert(kFewChunks % kAtOnce == 0);
  const int lane = threadIdx.x % 32, dim = part * kDims + lane * 4, there = lane * 4 < kDims ? chunks : 0;
  const int64_t at = static_cast<int64_t>(row) * tasks.partial_chunks;
  const float* const partial = tasks.partial + at * D + dim;
  float2 of = make_float2(-INFINITY, 0);
  if (lane < chunks) of = __ldcg(tasks.partial_scale + at + lane);
  float inverse = 0;
  float4 sum[kSlices];
#pragma unroll
  for (float4& x : sum) x = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (int first = 0; first < chunks; first += kAtOnce) {
    float4 value[kAtOnce][kSlices];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++)
#pragma unroll
      for (int s = 0; s < kSlices; s++) {
        value[k][s] = make_float4(0, 0, 0, 0);
        if (first + k < there)
          value[k][s] = __ldcg(reinterpret_cast<const float4*>(partial + (first + k) * D + s * 128));
      }
    if (__any_sync(~0u, first == 0)) {  // while the values are on their way
      const float share = exp_f32(of.x - warp_max(of.x));
      inverse = __fdividef(1, warp_sum(share * of.y));
      if (lane < kFewChunks) shares[lane] = share;
      __syncwarp();
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; k++)
#pragma unroll
      for (int s = 0; s < kSlices; s++) sum[s] = fused_four(shares[first + k], value[k][s], sum[s]);
  }
#pragma unroll
  for (int s = 0; s < kSlices; s++)
    if (there)
      leave_four(contract, tasks.out, static_cast<int64_t>(row) * D + dim + s * 128, scaled(sum[s], inverse));
}

/// The block's tasks, of which there is one at least.
template <int D>
__device__ __forceinline__ RingAt attend(const Tasks& tasks, Ring ring, const LayerArgs& layer, bool first,
                                         float* contract, uint64_t* inputs_there) {
  using Shape = TileShape<D>;
  constexpr int kStride = AttentionRoom<D>::kStride;
  const Cache& cache = layer.attention.cache;
  const QkvArgs& qa = layer.qkv;
  const float *const of_queries = first ? qa.q : tasks.q, *const of_keys = first ? qa.kv : tasks.kv;
  const int kv_heads = tasks.kv_heads, group = tasks.group;
  const int warp = warp_index(), lane = threadIdx.x % 32, column = lane / 4, quarter = lane % 4;
  const int top = warp / Shape::kParts * 8, of_dims = warp % Shape::kParts;  // of the warp's scores
  auto& room = *reinterpret_cast<AttentionRoom<D>*>(tasks.room);
  Weighted<D> weighted(room.weighted, warp, lane);

  AttentionTask now = tasks.first;
  bool begins = true, meets = true, more = true;  // meets: it has other queries than the last
  int turn = 0, ended = 0;                        // tasks of these queries
  sync_consumers();                               // what lay in the room has been read
#pragma unroll 1
  for (int i = tasks.end - 1; more;) {
    // Queries that are not there yet, keys and values of this step: a warp a head.
    const int queries = meets ? group : 0, jobs = queries + 2 * __popc(now.fresh);
    ring.wait_full(*tasks.peers);
    char *const keys = ring.data(0), *const values = ring.data(1);
#pragma unroll 1
    for (int job = warp; job < jobs; job += kWarps) {
      Head<D> to_place;
      const float* raw;
      Bf16 *to, *kept = nullptr;
      const Bf16* norm = qa.q_norm;
      int t = now.token;
      const bool of_query = job < queries, of_key = (job - queries) % 2 == 0;
      if (of_query) {
        raw = of_queries + static_cast<int64_t>((t * kv_heads + now.kv_head) * group + job) * D;
        to = reinterpret_cast<Bf16*>(room.query + job * kStride);
      } else {
        uint32_t fresh = now.fresh;
#pragma unroll 1
        for (int n = (job - queries) / 2; n > 0; n--) fresh &= fresh - 1;
        t = __ffs(static_cast<int>(fresh)) - 1;
        const int row = tasks.of[t].last - now.begin;
        raw = of_keys + static_cast<int64_t>((2 * t + (!of_key && qa.v_weight)) * kv_heads + now.kv_head) * D;
        to = reinterpret_cast<Bf16*>((of_key ? keys : values) + row * 2 * D);
        norm = of_key ? qa.k_norm : nullptr;
        if (t == now.token)
          kept = static_cast<Bf16*>(of_key ? cache.k : cache.v) + tasks.row_of(now, row) * D;
      }
      const int angles = t * qa.heads.rotary_pairs;
      to_place.ask(norm, norm ? qa.cosine + angles : nullptr, qa.sine + angles, qa.heads.rotary_pairs);
      to_place.place(raw, *tasks.peers, tasks.eps, to, kept);
    }
    if (inputs_there && threadIdx.x == 0) *inputs_there = ptx::globaltimer(), inputs_there = nullptr;
    if (begins) weighted.begin();
    if (jobs > 0) sync_consumers();

    {
      float even[4] = {}, odd[4] = {};
      const uint32_t at = of_dims * Shape::kPart * 2 + quarter * 16;
      const uint32_t key = ptx::shared_address(keys) + (top + column) * 2 * D + at,
                     query = ptx::shared_address(room.query) + column * kStride + at;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const uint4 x = ptx::ld_shared_v4(key + k * 64),
                    q = ptx::ld_shared_v4(query + k * 64, column < group);
        multiply(even, q.x, q.y, x.x, x.y);
        multiply(odd, q.z, q.w, x.z, x.w);
      }
      if (column < Shape::kHeads)
        *reinterpret_cast<float2*>(&room.scores[turn][of_dims][column][top + 2 * quarter]) =
            make_float2(even[0] + odd[0], even[1] + odd[1]);
    }
    AttentionTask next = now;
    tasks.next_tile(next, Shape::kRows);
    const bool ends = next.begin >= next.end;
    if (ends) {
      more = --i >= tasks.begin;
      if (more) next = tasks.at(i, Shape::kRows);
    }
    const bool leaves = !more || next.token != now.token || next.kv_head != now.kv_head;  // these queries
    if (more) tasks.look(next, Shape::kRows);
    sync_consumers();

    weighted.add(room.scores[turn], values, now.seen);
    if (jobs > queries) ptx::fence_proxy_async();  // what was laid there, before the copy engine comes again
    ring.release();

    if (ends) {
      const int pair = now.token * kv_heads + now.kv_head, chunks = tasks.of[now.token].chunks;
      const int64_t first = static_cast<int64_t>(pair) * group * tasks.partial_chunks + now.chunk;
      weighted.leave(tasks.partial + first * D, tasks.partial_scale + first, tasks.partial_chunks, group);
      ended++;
      if (leaves && joined_at_once(chunks)) {
        sync_consumers();
        if (threadIdx.x == 0) {
          uint32_t* const done = tasks.chunks_done + pair;
          const auto before = static_cast<uint32_t>(chunks - ended);
          room.last = before == 0 || ptx::atom_acq_rel_gpu_add(done, ended) == before;
          if (room.last) *done = 0;  // for the next layer, which begins after all blocks have met
        }
        sync_consumers();
        constexpr int kSharing = kWarps / Shape::kHeads;  // warps of a head
        if (room.last && warp / kSharing < group)
          join_at_once<D>(tasks, contract, pair * group + warp / kSharing, chunks, warp % kSharing,
                          room.share[warp]);
      }
      if (leaves) ended = 0;
    }
    now = next, begins = ends, meets = leaves, turn ^= 1;
  }
  return ring.at();
}

/// Out of line, where few layers come by: the registers of others are not spilled for its sums.
__device__ __noinline__ inline RingAt attend_wide(const Tasks& tasks, Ring ring, const LayerArgs& layer,
                                                  bool first, float* contract, uint64_t* inputs_there) {
  return attend<512>(tasks, ring, layer, first, contract, inputs_there);
}

/// Joins the chunks of heads that have many: a task is 128 dimensions of one head.
__device__ __forceinline__ void join_chunks(const Context& c, const Tasks& tasks, int dims, float* contract) {
  const int heads = tasks.kv_heads * tasks.group;
  const int slices = dims / 128, all = c.tokens * heads * slices;
  struct Room {
    float4 sum[kWarps][32];
    float share[kWarps][kMostChunks];
  };
  auto& room = *reinterpret_cast<Room*>(c.acts);
#pragma unroll 1
  for (int i = blockIdx.x; i < all; i += gridDim.x) {
    const int row = i / slices, dim = i % slices * 128 + c.lane * 4;
    const int chunks = tasks.of[row / heads].chunks;
    if (joined_at_once(chunks)) continue;
    const int64_t first = static_cast<int64_t>(row) * c.p.partial_chunks;
    float2 of[kMostChunks / 32];
    float max = -INFINITY, total = 0;
#pragma unroll
    for (int j = 0; j < kMostChunks / 32; j++) {
      of[j] = make_float2(-INFINITY, 0);
      if (c.lane + j * 32 < chunks) of[j] = __ldcg(c.p.partial_scale + first + c.lane + j * 32);
    }
#pragma unroll
    for (const float2& x : of) max = x.x > max ? x.x : max;
    max = warp_max(max);
    float* const shares = room.share[c.warp];
#pragma unroll
    for (int j = 0; j < kMostChunks / 32; j++) {
      const float share = exp_f32(of[j].x - max);
      shares[c.lane + j * 32] = share, total = fused(share, of[j].y, total);
    }
    total = warp_sum(total);
    __syncwarp();
    const float* const value = c.p.partial + first * dims + dim;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int k = c.warp; k < chunks; k += kWarps)
      sum = fused_four(shares[k], __ldcg(reinterpret_cast<const float4*>(value + k * dims)), sum);
    room.sum[c.warp][c.lane] = sum;
    sync_consumers();
    if (c.warp == 0) {
#pragma unroll
      for (int w = 1; w < kWarps; w++) sum = plus(sum, room.sum[w][c.lane]);
      leave_four(contract, tasks.out, static_cast<int64_t>(row) * dims + dim,
                 scaled(sum, __fdividef(1, total)));
    }
    sync_consumers();
  }
}

__device__ __forceinline__ void attention(Context& c, const LayerArgs& layer) {
  const Heads& h = layer.attention.heads;
  const Tasks& tasks = c.tasks[h.window == 0];
  float* const contract = c.last ? layer.attention.attention : nullptr;
  uint64_t* const inputs_there = c.marks ? c.marks + 1 : nullptr;
  if (tasks.begin < tasks.end)
    c.ring.go_to(h.head_dim == 256 ? attend<256>(tasks, c.ring, layer, c.first, contract, inputs_there)
                                   : attend_wide(tasks, c.ring, layer, c.first, contract, inputs_there));
  c.grid.arrive();
  c.grid.expect(gridDim.x);
  if (!tasks.many) return;
  c.grid.wait(c.peers);
  join_chunks(c, tasks, h.head_dim, contract);
  c.grid.arrive();
  c.grid.expect(gridDim.x);
}

}  // namespace TP_RESIDENT
