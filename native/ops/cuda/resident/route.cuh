// The middle of a layer. A token's residual after attention and the norms of it are one block's work; the
// router's rows are dealt out to all blocks; the choice is made by every block for itself, from the same
// logits.
#pragma once

#include "ops/cuda/resident/products.cuh"

namespace tp::cuda::resident {

/// m = hidden + norm(sum), of the block's token, and what router, dense MLP and experts make of it.
__device__ __forceinline__ void add_attention(Context& c, const RouteArgs& a) {
  const int n = c.p.dims.hidden;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * n;
  NormWeights post, dense, expert, scale;
  post.load(a.post_norm, n), dense.load(a.dense_norm, n), expert.load(a.expert_norm, n);
  scale.load(a.scale, n);
  Row hidden, sum;
  hidden.load(a.hidden + at, n);
  if (c.first)
    sum.load(a.sum + at, n);
  else
    sum = reduced(c.peers, c.epoch, at, n);
  c.mark(1);
  sum.change([](float x, int, int) { return rounded(x); });
  const float inverse = inverse_rms(c.sums.over_block(sum.squares()), n, c.p.dims.eps);
  hidden.change(
      [&](float x, int p, int j) { return rounded(x + rounded(sum.x[p][j] * inverse * post.at(p, j))); });
  hidden.store(a.hidden + at, n);
  const float of_hidden = inverse_rms(c.sums.over_block(hidden.squares()), n, c.p.dims.eps);
  const float root = 1.0f / __builtin_sqrtf(static_cast<float>(n));
  const auto leave = [&](Bf16* to, auto&& value) {
    Row row = hidden;
    row.change([&](float x, int p, int j) { return value(x * of_hidden, p, j); });
    row.put(to + at, n);
  };
  const Activations& to = c.p.activations;
  leave(to.router_in, [&](float x, int p, int j) { return rounded(rounded(x) * scale.at(p, j)) * root; });
  leave(to.dense_in, [&](float x, int p, int j) { return x * dense.at(p, j); });
  leave(to.expert_in, [&](float x, int p, int j) { return x * expert.at(p, j); });
}

/// The K most probable experts of every token, a warp a token, and the list of them all. The block that
/// stores also leaves them where the ops' contract has them.
__device__ __forceinline__ void choose(Context& c, const RouteArgs& a, bool store) {
  __shared__ int index[kMostTokens][kMostTopK];
  __shared__ float weight[kMostTokens][kMostTopK];
  __shared__ int voters[kWarps];
  static_assert(kMostExperts < kThreads);
  const int experts = c.p.dims.experts, top_k = c.p.dims.top_k, t = c.warp;
  if (t < c.tokens) {
    constexpr int kPer = kMostExperts / 32;
    float p[kPer], scale[kPer], max = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      const int e = c.lane + 32 * i;
      p[i] = e < experts ? __ldcg(a.router_logits + t * experts + e) : -INFINITY;
      scale[i] = e < experts ? to_float(a.per_expert_scale[e]) : 0;  // on its way with the logits
      max = p[i] > max ? p[i] : max;
    }
    max = warp_max(max);
#pragma unroll
    for (int i = 0; i < kPer; i++) total += p[i] = exp_f32(p[i] - max);
    total = warp_sum(total);
#pragma unroll
    for (int i = 0; i < kPer; i++) p[i] = c.lane + 32 * i < experts ? p[i] / total : -1.0f;
    float chosen = 0, mine = 0;  // lane k keeps the k-th
    int who = 0;
#pragma unroll 1
    for (int k = 0; k < top_k; k++) {
      // Probabilities are not negative: their bits are in their order.
      uint32_t best = 0;
      int at = INT_MAX;
#pragma unroll
      for (int i = 0; i < kPer; i++)
        if (p[i] >= 0 && (at == INT_MAX || bits_of(p[i]) > best)) best = bits_of(p[i]), at = c.lane + 32 * i;
      const uint32_t most = __reduce_max_sync(~0u, best);
      unsigned expert = __reduce_min_sync(~0u, best == most ? static_cast<unsigned>(at) : INT_MAX);
      if (expert >= static_cast<unsigned>(experts))
        expert = static_cast<unsigned>(k);  // not numbers: any expert, but a valid one
      if (c.lane == k) mine = float_of(most), who = static_cast<int>(expert);
      chosen += float_of(most);
#pragma unroll
      for (int i = 0; i < kPer; i++)
        if (c.lane + 32 * i == static_cast<int>(expert)) p[i] = -1;
    }
    float of_who = 0;
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      const float there = __shfl_sync(~0u, scale[i], who % 32);
      if (who / 32 == i) of_who = there;
    }
    if (c.lane < top_k) {
      index[t][c.lane] = who;
      weight[t][c.lane] = mine / chosen * of_who;
      if (store) {
        a.route_index[t * top_k + c.lane] = who;
        a.route_weight[t * top_k + c.lane] = weight[t][c.lane];
      }
    }
  }
  sync_consumers();
  const int e = threadIdx.x;
  uint64_t slots = ~0ull;
  int before = 0;
#pragma unroll 1
  for (int token = 0; token < c.tokens; token++)
#pragma unroll 2
    for (int k = 0; k < top_k; k++) {
      before += index[token][k] < e;
      if (index[token][k] == e) slots ^= (0xffull ^ static_cast<uint64_t>(k)) << (8 * token);
    }
  const bool any = slots != ~0ull;
  const unsigned votes = __ballot_sync(~0u, any);
  if (c.lane == 0) voters[c.warp] = __popc(votes);
  sync_consumers();
  int at = __popc(votes & ((1u << c.lane) - 1)), all = 0;
  for (int w = 0; w < kWarps; w++) {
    if (w < c.warp) at += voters[w];
    all += voters[w];
  }
  if (any) {
    c.chosen->expert[at] = e, c.chosen->slots[at] = slots;
#pragma unroll 1
    for (int token = 0; token < c.tokens; token++) {
      const int slot = static_cast<signed char>(slots >> (8 * token));
      c.chosen->weight[at][token] = slot < 0 ? 0 : weight[token][slot];
    }
  }
  if (e == 0) c.chosen->count = all;
  if (store && e <= experts) a.expert_start[e] = before;
  sync_consumers();
  if (e == 0) ptx::mbarrier_arrive(c.listed);
}

__device__ __forceinline__ void route(Context& c, const LayerArgs& layer) {
  const RouteArgs& a = layer.route;
  const Dims& d = c.p.dims;
  const int n = d.hidden, blocks = static_cast<int>(gridDim.x);
  NormWeights router;
  if (static_cast<int>(blockIdx.x) < d.experts)
    router.load(a.router + static_cast<int64_t>(blockIdx.x) * n, n);
  if (c.owner()) {
    add_attention(c, a);
    c.owners.arrive();
  }
  c.owners.expect(c.tokens);
  c.owners.wait(c.peers);
  c.mark(2);
  if (!c.last) {  // what the next stage multiplies
    const int stride = stride_of(2 * n);
    fetch_acts(c, c.acts, stride, c.p.activations.dense_in, c.tokens, n);
    if (char* const to = c.expert_room(stride)) fetch_acts(c, to, stride, c.p.activations.expert_in, c.tokens, n);
  }
#pragma unroll 1
  for (int e = blockIdx.x; e < d.experts; e += blocks) {
    if (e >= blocks) router.load(a.router + static_cast<int64_t>(e) * n, n);
    c.sums.next();
#pragma unroll 4
    for (int t = 0; t < c.tokens; t++) {
      Row z;
      z.fetch(c.p.activations.router_in + static_cast<int64_t>(t) * n, n);
      float logit = 0;
      z.change([&](float x, int p, int j) {
        logit = fused(x, router.at(p, j), logit);
        return x;
      });
      c.sums.give(t, logit);
    }
    sync_consumers();
    if (static_cast<int>(threadIdx.x) < c.tokens)
      a.router_logits[threadIdx.x * d.experts + e] = c.sums.take(threadIdx.x);
  }
  c.grid.arrive();
  c.grid.expect(gridDim.x);
  if (!c.last) return;
  c.grid.wait(c.peers);
  choose(c, a, blockIdx.x == 0);
}

}  // namespace tp::cuda::resident
