// The middle of a layer. A token's residual after attention and the norms of it are one block's work, or, of
// a token alone, every block's; the router's rows are dealt out to all blocks; the choice is made by every
// block for itself, from the same logits, as soon as they are there.
#pragma once

#include "ops/cuda/resident/products.cuh"

namespace TP_RESIDENT {

/// m = hidden + norm(sum), of the block's token, and what router, dense MLP and experts make of it.
__device__ __forceinline__ void add_attention(Context& c, const RouteArgs& a, Bf16* router_in, Bf16* dense_in,
                                              Bf16* expert_in) {
  constexpr int n = kRowLength;
  const int64_t at = int64_t{c.row()} * n;
  // A token alone leaves its rows where the weights of the norms lay.
  const auto room = [&](int i) { return c.acts + i * stride_of(2 * n); };
  NormWeights::ask(room(0), a.dense_norm), NormWeights::ask(room(1), a.expert_norm);
  NormWeights::ask(room(2), a.scale), NormWeights::ask(room(3), a.post_norm);
  Row hidden, sums[1];
  Row& sum = sums[0];
  if (c.first)
    sum.load(a.sum + at, n);
  else
    reduced(sums, c.peers, c.sum_turn, at);
  c.mark(1);
  ptx::cp_async_wait_all();
  NormWeights post, dense, expert, scale;
  post.get(room(3));
  hidden.get(c.residual, n);
  sum.change([](float x, int, int) { return rounded(x); });
  const float inverse = inverse_rms_of<kRowLength>(c.sums.over_block(sum.squares()), c.p.dims.eps);
  hidden.change(
      [&](float x, int p, int j) { return rounded(x + rounded(sum.x[p][j] * inverse * post.at(p, j))); });
  dense.get(room(0)), expert.get(room(1)), scale.get(room(2));
  const float of_hidden = inverse_rms_of<kRowLength>(c.sums.over_block(hidden.squares()), c.p.dims.eps);
  const float root = 1.0f / __builtin_sqrtf(static_cast<float>(n));
  const auto leave = [&](Bf16* to, auto&& value) {
    Row row = hidden;
    row.change([&](float x, int p, int j) { return value(x * of_hidden, p, j); });
    row.put(to, n);
  };
  leave(router_in, [&](float x, int p, int j) { return rounded(rounded(x) * scale.at(p, j)) * root; });
  leave(dense_in, [&](float x, int p, int j) { return x * dense.at(p, j); });
  leave(expert_in, [&](float x, int p, int j) { return x * expert.at(p, j); });
  if (!c.alone()) c.early.arrive();
  hidden.put(c.residual, n);
  if (c.owner()) hidden.store(a.hidden + at, n);  // for whatever follows the launch
}

/// a / b but for the last bit of the tiniest quotients, without the branches of a division: b is near 1.
__device__ __forceinline__ float quotient(float a, float b) {
  float inverse = __fdividef(1.0f, b);
  inverse = fused(fused(-b, inverse, 1.0f), inverse, inverse);
  const float near = a * inverse;
  return fused(fused(-b, near, a), inverse, near);
}

/// Where the experts are chosen, a token by a warp; a lane has four neighbouring experts.
struct Choice {
  static constexpr int kLanes = 32, kPer = kMostExperts / kLanes;
  static_assert(kPer == 4 && kMostTopK * kPer == kLanes);
  /// Of a token, in the order of ids: first the most probable expert of each lane, then all of the eight
  /// lanes that are ahead, which hold the eight most probable of all.
  struct Rivals {
    float probability[2][kLanes], scale[kLanes], chosen[kMostTopK];
    int lane[kMostTopK];
  };
  Rivals rivals[kMostTokens];
  uint64_t slots[kTokenGroups][kMostExperts];  // as in Chosen
};
static_assert(sizeof(Choice) <= kRoomFloats * sizeof(float));

/// Of a token's logits: one of its eight most probable experts a lane, how many of them are ahead of it, and
/// its probability. By a warp.
__device__ __forceinline__ void rank_experts(float (&p)[Choice::kPer], const Bf16 (&scale)[Choice::kPer],
                                             Choice& choice, int t, int top_k, int& rank, int& expert,
                                             float& own) {
  constexpr int kPer = Choice::kPer;
  const int lane = threadIdx.x % 32;
  const unsigned lower = (1u << lane) - 1;
  Choice::Rivals& rivals = choice.rivals[t];
  // Bits of numbers as whole numbers of the same order, and back.
  const auto in_order = [](int bits) { return bits ^ (bits >> 31 & INT_MAX); };
  const float most = fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3]));
  const float max = float_of(in_order(__reduce_max_sync(~0u, in_order(static_cast<int>(bits_of(most))))));
  float total = 0;
#pragma unroll
  for (float& x : p) total += x = ptx::ex2_approx((x - max) * 1.44269504f);
  total = warp_sum(total);
  // What is no number, or no expert, is least probable; among equals the lower id is ahead.
#pragma unroll
  for (float& x : p) x = fmaxf(quotient(x, total), 0);
  rivals.probability[0][lane] = fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3]));
#pragma unroll 1
  for (int round = 0; round < 2; round++) {
    __syncwarp();
    const float* const all = rivals.probability[round];
    own = all[lane], rank = 0;
    // Larger ones, and equal ones before it. Not negative, so the bits are in the numbers' order, and no
    // difference of theirs overflows.
#pragma unroll
    for (int j = 0; j < Choice::kLanes; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(all + j);
      const uint32_t bar = bits_of(own) - (j + 4 <= lane);
      for (const float other : {four.x, four.y, four.z, four.w}) rank += (bar - bits_of(other)) >> 31;
    }
#pragma unroll
    for (int i = 0; i < 3; i++) rank += i < lane % 4 && all[lane / 4 * 4 + i] == own;
    const bool ahead = rank < kMostTopK;
    const int place = __popc(__ballot_sync(~0u, ahead) & lower);
    if (round > 0 || !ahead) continue;
    reinterpret_cast<float4*>(rivals.probability[1])[place] = make_float4(p[0], p[1], p[2], p[3]);
    reinterpret_cast<float4*>(rivals.scale)[place] =
        make_float4(to_float(scale[0]), to_float(scale[1]), to_float(scale[2]), to_float(scale[3]));
    rivals.lane[place] = lane;
  }
  if (rank < kMostTopK) rivals.chosen[rank] = rank < top_k ? own : 0;
  expert = rivals.lane[lane / kPer] * kPer + lane % kPer;
  if (rank < top_k)
    reinterpret_cast<uint8_t*>(&choice.slots[t / kColumns][expert])[t % kColumns] =
        static_cast<uint8_t>(rank);
}

/// The K most probable experts of every token and the list of them all. The block that stores also leaves
/// them where the ops' contract has them. Out of line, and without the context, which would have to lie in
/// memory.
/// logits: (T, stride) of the tokens, to be waited for if there is `someone` to say that it takes too long.
__device__ __noinline__ inline void choose_of(const RouteArgs& a, const float* logits, int stride,
                                              const PeerMemory* someone, Choice& choice, Chosen& list,
                                              uint32_t listed, int tokens, int experts, int top_k,
                                              bool store) {
  constexpr int kPer = Choice::kPer;
  const int lane = threadIdx.x % 32, warp = warp_index(), first = lane * kPer;
  const unsigned lower = (1u << lane) - 1;
  const Bf16* const scales = a.per_expert_scale + first;
  float p[kTokenGroups][kPer];
  Bf16 scale[kPer];
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    const bool there = warp < tokens && first + i < experts;
#pragma unroll
    for (int g = 0; g < kTokenGroups; g++) {
      const int t = g * kWarps + warp;
      p[g][i] = there && t < tokens && !someone ? __ldcg(logits + t * stride + first + i) : -INFINITY;
    }
    scale[i] = there ? __ldg(scales + i) : 0;
  }
#pragma unroll
  for (int g = 0; g < kTokenGroups; g++) {
    const int t = g * kWarps + warp;
    if (!someone || !__any_sync(~0u, t < tokens)) continue;
    for (Timeout timeout;; timeout.poll(*someone, kTimeoutNs)) {
      const uint4 four = ptx::ld_relaxed_gpu_v4(logits + t * stride + first);
      const uint32_t bits[] = {four.x, four.y, four.z, four.w};
      bool there = true;
#pragma unroll
      for (int i = 0; i < kPer; i++)
        if (first + i < experts) there &= bits[i] != kNothing, p[g][i] = float_of(bits[i]);
      if (__all_sync(~0u, there)) break;
    }
  }
  if (threadIdx.x < kMostExperts)
#pragma unroll
    for (int g = 0; g < kTokenGroups; g++) choice.slots[g][threadIdx.x] = ~0ull;
  sync_consumers();
  int rank[kTokenGroups], expert[kTokenGroups];
  float own[kTokenGroups];
#pragma unroll
  for (int g = 0; g < kTokenGroups; g++) {
    rank[g] = kMostTopK, expert[g] = 0, own[g] = 0;
    // Votes tell the compiler that a warp stays together: shuffles where it might not cost twice the code.
    if (__any_sync(~0u, g * kWarps + warp < tokens))
      rank_experts(p[g], scale, choice, g * kWarps + warp, top_k, rank[g], expert[g], own[g]);
  }
  sync_consumers();
  // An expert's place in the list: how many lower ones were chosen. The first warp writes the list, for which
  // the ring waits; then each the weights of its token.
  uint64_t slots[kTokenGroups][kPer];
  bool is_chosen[kPer];
  int at = 0, count = 0;
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    is_chosen[i] = false;
#pragma unroll
    for (int g = 0; g < kTokenGroups; g++)
      slots[g][i] = choice.slots[g][first + i], is_chosen[i] |= slots[g][i] != ~0ull;
    const unsigned votes = __ballot_sync(~0u, is_chosen[i]);
    at += __popc(votes & lower), count += __popc(votes);
  }
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      if (!is_chosen[i]) continue;
      list.expert[at] = first + i;
#pragma unroll
      for (int g = 0; g < kTokenGroups; g++) list.slots[g][at] = slots[g][i];
      at++;
    }
    if (lane == 0) list.count = count;
  }
  __syncwarp();
  if (threadIdx.x == 0) ptx::mbarrier_arrive(listed);
#pragma unroll
  for (int g = 0; g < kTokenGroups; g++) {
    const int t = g * kWarps + warp;
    const Choice::Rivals& rivals = choice.rivals[t];
    float chosen = 0;
#pragma unroll
    for (const float x : rivals.chosen) chosen += x;
    const int place = __popc(__ballot_sync(~0u, rank[g] < top_k) & lower);  // among its token's, by id
    if (rank[g] >= top_k) continue;
    const float weight = quotient(own[g], chosen) * rivals.scale[lane];
    list.of_token[t][place] = rank[g], list.weight[t][place] = weight;
    if (store) a.route_index[t * top_k + rank[g]] = expert[g], a.route_weight[t * top_k + rank[g]] = weight;
  }
  if (!__any_sync(~0u, store)) return;
  // Assignments of a lane's experts, and of those before them.
  int each[kPer] = {}, before = 0;
#pragma unroll
  for (int i = 0; i < kPer; i++) {
#pragma unroll
    for (int g = 0; g < kTokenGroups; g++) each[i] += __popcll(~slots[g][i] & 0x8080808080808080ull);
    before += each[i];
  }
  const int mine = before;
#pragma unroll
  for (int span = 1; span < Choice::kLanes; span *= 2) {
    const int others = __shfl_up_sync(~0u, before, span);
    before += lane >= span ? others : 0;
  }
  before -= mine;
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    if (warp == 0 && first + i < experts) a.expert_start[first + i] = before;
    before += each[i];
  }
  if (threadIdx.x == 0) a.expert_start[experts] = tokens * top_k;
}

/// Of this launch: the logits are on their way; else they are where the ops' contract has them.
__device__ __forceinline__ void choose(Context& c, const RouteArgs& a, bool of_this_launch, bool store) {
  const int experts = c.p.dims.experts;
  choose_of(a, of_this_launch ? c.p.scores : a.router_logits, of_this_launch ? kMostExperts : experts,
            of_this_launch ? &c.peers : nullptr, *reinterpret_cast<Choice*>(c.next_room()), *c.chosen,
            c.listed, c.tokens, experts, c.p.dims.top_k, store);
}

/// Calls each(e) for the experts whose logits the block makes.
template <class Each>
__device__ __forceinline__ void each_own_expert(const Context& c, Each&& each) {
#pragma unroll 1
  for (int e = blockIdx.x; e < c.p.dims.experts; e += static_cast<int>(gridDim.x)) each(e);
}

/// Empties the block's scores, which all blocks have read.
__device__ __forceinline__ void empty_scores(const Context& c) {
  const auto t = static_cast<int>(threadIdx.x);
  each_own_expert(c, [&](int e) {
    if (t < c.tokens) c.p.scores[t * kMostExperts + e] = float_of(kNothing);
  });
}

/// Starts to bring the router's row of an expert.
__device__ __forceinline__ void fetch_router(const RouteArgs& a, char* to, int expert) {
  constexpr int kPieces = kWholePieces * kWarps;
#pragma unroll 1
  for (int i = threadIdx.x; i < kPieces; i += kThreads)
    ptx::cp_async_16(ptx::shared_address(to) + i * 16, a.router + (int64_t{expert} * kPieces + i) * 8);
}

/// A token's router_in, of a token alone in shared memory, times a row of the router there, by a warp. Of the
/// products of all lanes' elements with each other those of lanes of the same column count: the diagonal of a
/// tensor-core product.
__device__ __forceinline__ float logit_of(const Context& c, const Bf16* router_in, const char* row) {
  constexpr int kSteps = kWholePieces * kWarps / 32;
  uint4 z[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    const uint4* const from = reinterpret_cast<const uint4*>(router_in) + i * 32 + c.lane;
    z[i] = c.alone() ? *from : __ldcg(from);
  }
  const uint32_t weights = ptx::shared_address(row) + c.lane * 16;
  float acc[4][4] = {};
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    const uint4 w = ptx::ld_shared_v4(weights + i * 32 * 16);
    multiply(acc[i % 2 * 2], z[i].x, z[i].y, w.x, w.z);
    multiply(acc[i % 2 * 2 + 1], z[i].z, z[i].w, w.y, w.w);
  }
  const int i = c.column % 2;
  const float own = (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]);
  return warp_sum(c.quarter == c.column / 2 ? own : 0);
}

__device__ __forceinline__ void route(Context& c, const LayerArgs& layer) {
  const RouteArgs& a = layer.route;
  const Dims& d = c.p.dims;
  const int n = d.hidden, stride = stride_of(2 * n);
  char* const row = reinterpret_cast<char*>(c.next_room());
  if (static_cast<int>(blockIdx.x) < d.experts) fetch_router(a, row, blockIdx.x);
  const Activations& to = c.p.activations;
  const auto here = [&](int i) { return reinterpret_cast<Bf16*>(c.acts + i * stride); };
  if (c.alone()) {
    add_attention(c, a, here(2), here(0), here(1));
    ptx::cp_async_wait_all();
    sync_consumers();
  } else {
    const int64_t at = static_cast<int64_t>(c.row()) * n;
    if (c.owner()) add_attention(c, a, to.router_in + at, to.dense_in + at, to.expert_in + at);
    c.early.expect(c.tokens);
    ptx::cp_async_wait_all();
    c.early.wait(c.peers);
  }
  c.mark(2);
  each_own_expert(c, [&](int e) {
    if (e >= static_cast<int>(gridDim.x)) {
      sync_consumers();
      fetch_router(a, row, e);
      ptx::cp_async_wait_all();
      sync_consumers();
    }
#pragma unroll
    for (int g = 0; g < kTokenGroups; g++) {
      const int t = g * kWarps + c.warp;
      if (!__any_sync(~0u, t < c.tokens)) return;
      const float logit = logit_of(c, c.alone() ? here(2) : to.router_in + int64_t{t} * n, row);
      if (c.lane > 0) continue;
      a.router_logits[t * d.experts + e] = logit;
      if (!c.last) ptx::st_relaxed_gpu(c.p.scores + t * kMostExperts + e, value_of(logit));
    }
  });
  if (!c.last) {
    if (c.alone()) return;
    // What the next stage multiplies, behind the rows for which everyone waits.
    fetch_acts(c.acts, stride, to.dense_in, c.tokens, n, n);
    if (char* const room = c.expert_room(stride)) fetch_acts(room, stride, to.expert_in, c.tokens, n, n);
    return;
  }
  c.grid.arrive();
  c.grid.expect(gridDim.x);
  c.grid.wait(c.peers);
  choose(c, a, false, blockIdx.x == 0);
}

}  // namespace TP_RESIDENT
