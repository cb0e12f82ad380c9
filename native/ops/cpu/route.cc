// The middle of a layer: residual after attention, the two FFN inputs, and the router. Replicated on every
// rank.
#include "ops/cpu/cpu.h"
#include "ops/cpu/norm.h"

namespace tp::TP_ISA {

namespace {

/// The K most probable experts of one token and their weights. Equal logits: the lower id.
void choose(float* logits, const Bf16* per_expert_scale, int experts, int top_k, int* index, float* weight) {
  float max = logits[0];
  for (int e = 1; e < experts; e++) max = logits[e] > max ? logits[e] : max;
  float total = 0;
  for (int e = 0; e < experts; e++) total += logits[e] = exp_f32(logits[e] - max);
  for (int e = 0; e < experts; e++) logits[e] /= total;
  float chosen = 0;
  for (int k = 0; k < top_k; k++) {
    int best = 0;
    for (int e = 1; e < experts; e++)
      if (logits[e] > logits[best]) best = e;
    index[k] = best;
    weight[k] = logits[best];
    chosen += weight[k];
    logits[best] = -1.0f;  // below any probability
  }
  for (int k = 0; k < top_k; k++) weight[k] = weight[k] / chosen * to_float(per_expert_scale[index[k]]);
}

/// Sorts the assignments (token * K + slot) by expert, keeping the order of tokens.
void sort_by_expert(const int* route_index, int assignments, int experts, int* start, int* sorted) {
  for (int e = 0; e <= experts; e++) start[e] = 0;
  for (int i = 0; i < assignments; i++) start[route_index[i] + 1]++;
  for (int e = 0; e < experts; e++) start[e + 1] += start[e];
  for (int i = 0; i < assignments; i++) sorted[start[route_index[i]]++] = i;
  for (int e = experts; e > 0; e--) start[e] = start[e - 1];
  start[0] = 0;
}

}  // namespace

void route(const RouteArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const int n = d.hidden;
  const float root = 1.0f / __builtin_sqrtf(static_cast<float>(n));
  backend.parallel(in.tokens, [&](int t, int thread) {
    const int64_t at = static_cast<int64_t>(t) * n;
    const auto branch = static_cast<float*>(backend.scratch(thread, sizeof(float) * n));
    for (int i = 0; i < n; i++) branch[i] = round_to(d.bfloat16, a.sum[at + i]);
    rms_norm(branch, a.post_norm, n, d.eps, d.bfloat16, branch);
    for (int i = 0; i < n; i++) a.hidden[at + i] = round_to(d.bfloat16, a.hidden[at + i] + branch[i]);
    rms_norm(a.hidden + at, a.dense_norm, n, d.eps, d.bfloat16, a.dense_in + at);
    rms_norm(a.hidden + at, a.expert_norm, n, d.eps, d.bfloat16, a.expert_in + at);
    rms_norm(a.hidden + at, nullptr, n, d.eps, d.bfloat16, a.normed + at);
    for (int i = 0; i < n; i++) {
      const float scaled = round_to(d.bfloat16, a.normed[at + i] * to_float(a.scale[i]));
      a.normed[at + i] = round_to(d.bfloat16, scaled * root);
    }
  });
  const Blocks blocks(d.experts, backend.threads());
  backend.parallel(blocks.count(), [&](int block, int thread) {
    const auto x = static_cast<const float**>(backend.scratch(thread, sizeof(float*) * in.tokens));
    row_pointers(a.normed, in.tokens, n, x);
    const int first = blocks.first(block);
    mat_vec(a.router + static_cast<int64_t>(first) * n, n, blocks.rows_of(block), x, in.tokens, n,
            [&](int row, int t, float value) { a.router_logits[t * d.experts + first + row] = value; });
  });
  for (int t = 0; t < in.tokens; t++)
    choose(a.router_logits + t * d.experts, a.per_expert_scale, d.experts, d.top_k,
           a.route_index + t * d.top_k, a.route_weight + t * d.top_k);
  sort_by_expert(a.route_index, in.tokens * d.top_k, d.experts, a.expert_start, a.assignment);
}

}  // namespace tp::TP_ISA
