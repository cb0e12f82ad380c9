// What both ways of routing share: a token's norms by a block, and its choice of experts by a warp.
#pragma once

#include "ops/cuda/gemv.cuh"

namespace tp::cuda {

constexpr int kFewExperts = 128;

struct RouteParameters {
  RouteArgs args;
  Matrix router;
  Split split;
  int tokens, experts, top_k, slots;
  float eps, root;  // root: H^-1/2
  bool bfloat16, sort;
};

/// The norms' weights of a block's rows, asked for before the inputs are there.
template <int Per, bool Aligned>
struct RouteNorms {
  Row<Per, Aligned> post, dense, expert, scale;
  __device__ RouteNorms(const RouteArgs& a, int n) {
    post.load(a.post_norm, n), dense.load(a.dense_norm, n), expert.load(a.expert_norm, n),
        scale.load(a.scale, n);
  }
};

/// The residual after attention, the inputs of dense MLP and experts, and z, of one token, by one block.
template <int Per, bool Aligned>
__device__ inline void token_norms(const RouteParameters& p, const RouteNorms<Per, Aligned>& norms, int t,
                                   float* room) {
  const RouteArgs& a = p.args;
  const int n = p.split.total;
  const int64_t at = static_cast<int64_t>(t) * n;
  const auto r = [&](float x) { return round_to(p.bfloat16, x); };
  Row<Per, Aligned> m, out;
  m.load(a.sum + at, n), out.load(a.hidden + at, n);
  m.change(r);
  float squares[1] = {m.squares()};
  block_sums(squares, room);
  const float of_branch = inverse_rms(squares[0], n, p.eps);
  m.change([&](float x, float hidden, float w) { return r(hidden + r(x * of_branch * w)); }, out, norms.post);
  squares[0] = m.squares();
  block_sums(squares, room);
  const float inverse = inverse_rms(squares[0], n, p.eps);
  const auto z = [&](float, float x, float w) { return r(r(r(x * inverse) * w) * p.root); };
  const auto normed = [&](float, float x, float w) { return r(x * inverse * w); };
  out.change(z, m, norms.scale);
  out.store(a.normed + at, n);
  m.store(a.hidden + at, n);
  out.change(normed, m, norms.dense);
  out.store(a.dense_in + at, n);
  out.change(normed, m, norms.expert);
  out.store(a.expert_in + at, n);
}

/// The K most probable experts of one token and their weights, by one warp; a lane has every 32nd expert.
/// At most 128 experts. Equal probabilities: the lower id.
__device__ inline void choose(const float* logits, const RouteParameters& p, int t) {
  constexpr int kPer = kFewExperts / 32;
  const int lane = threadIdx.x % 32;
  float x[kPer], max = -INFINITY, total = 0;
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    x[i] = lane + 32 * i < p.experts ? __ldcg(logits + lane + 32 * i) : -INFINITY;
    max = x[i] > max ? x[i] : max;
  }
  max = warp_max(max);
#pragma unroll
  for (int i = 0; i < kPer; i++) total += x[i] = lane + 32 * i < p.experts ? exp_f32(x[i] - max) : 0;
  total = warp_sum(total);
  // Probabilities are not negative, so their bits are in their order; one more, so that 0 is none.
  uint32_t key[kPer];
#pragma unroll
  for (int i = 0; i < kPer; i++) key[i] = lane + 32 * i < p.experts ? bits_of(x[i] / total) + 1 : 0;
  float chosen = 0, mine = 0;  // lane k keeps the k-th (K <= 32)
  int index = 0;
#pragma unroll 1
  for (int k = 0; k < p.top_k; k++) {
    uint32_t best = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < kPer; i++)
      if (key[i] > best) best = key[i], at = i;
    const uint32_t most = __reduce_max_sync(~0u, best);
    const unsigned who = __reduce_min_sync(~0u, best == most ? static_cast<unsigned>(lane + 32 * at) : ~0u);
#pragma unroll
    for (int i = 0; i < kPer; i++)
      if (who == static_cast<unsigned>(lane + 32 * i)) key[i] = 0;
    if (lane == k) mine = float_of(most - 1), index = static_cast<int>(who);
    chosen += float_of(most - 1);
  }
  if (lane < p.top_k) {
    p.args.route_index[t * p.top_k + lane] = least(index, p.experts - 1);
    p.args.route_weight[t * p.top_k + lane] =
        mine / chosen * to_float(p.args.per_expert_scale[least(index, p.experts - 1)]);
  }
}

/// The same for any number of experts, in shared memory.
static __device__ __noinline__ void choose_of_many(const float* logits, float* probability,
                                                   const RouteParameters& p, int t) {
  const int lane = threadIdx.x % 32, experts = p.experts;
  float max = -INFINITY;
#pragma unroll 1
  for (int e = lane; e < experts; e += 32) {
    const float logit = probability[e] = __ldcg(logits + e);
    max = logit > max ? logit : max;
  }
  max = warp_max(max);
  float total = 0;
#pragma unroll 1
  for (int e = lane; e < experts; e += 32) total += probability[e] = exp_f32(probability[e] - max);
  total = warp_sum(total);
  // Every lane knows the best of its own experts. Probabilities are positive: their bits are in their order.
  uint32_t best = 0;
  int at = INT_MAX;
  const auto look = [&] {
    best = 0, at = INT_MAX;
#pragma unroll 1
    for (int e = lane; e < experts; e += 32)
      if (probability[e] >= 0 && (at == INT_MAX || bits_of(probability[e]) > best))
        best = bits_of(probability[e]), at = e;
  };
#pragma unroll 1
  for (int e = lane; e < experts; e += 32) probability[e] /= total;
  look();
  float chosen = 0, mine = 0;  // lane k keeps the k-th (K <= 32)
  int index = 0;
#pragma unroll 1
  for (int k = 0; k < p.top_k; k++) {
    const uint32_t most = __reduce_max_sync(~0u, best);
    unsigned who = __reduce_min_sync(~0u, best == most ? static_cast<unsigned>(at) : INT_MAX);
    if (who >= static_cast<unsigned>(experts))
      who = static_cast<unsigned>(k);  // not numbers: any expert, but a valid one
    if (lane == k) mine = float_of(most), index = static_cast<int>(who);
    chosen += float_of(most);
    if (static_cast<int>(who) != at) continue;
    probability[who] = -1;
    look();
  }
  if (lane < p.top_k) {
    p.args.route_index[t * p.top_k + lane] = index;
    p.args.route_weight[t * p.top_k + lane] = mine / chosen * to_float(p.args.per_expert_scale[index]);
  }
}

}  // namespace tp::cuda
