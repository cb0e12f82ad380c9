// Input norm, the three projections as one list of rows, then per head: norm, RoPE, and k and v into the
// cache.
#include "ops/cpu/cpu.h"
#include "ops/cpu/norm.h"

namespace tp::TP_ISA {

namespace {

/// Rotates pairs (i, i + D/2) by the position's angles; in fp32, the caller rounds once.
TP_INLINE void rope(float* head, int dim, int pairs, const float* cosine, const float* sine, bool bfloat16) {
  for (int i = 0; i < pairs; i++) {
    const float x = head[i], y = head[i + dim / 2];
    head[i] = round_to(bfloat16, tp::fused(x, cosine[i], -(y * sine[i])));
    head[i + dim / 2] = round_to(bfloat16, tp::fused(y, cosine[i], x * sine[i]));
  }
}

TP_INLINE void to_cache(void* cache, int64_t at, const float* head, int dim, bool bfloat16) {
  if (!bfloat16) {
    memcpy(static_cast<float*>(cache) + at, head, static_cast<size_t>(dim) * sizeof(float));
    return;
  }
  Bf16* out = static_cast<Bf16*>(cache) + at;
  for (int i = 0; i < dim; i++) out[i] = to_bf16(head[i]);
}

}  // namespace

void qkv(const QkvArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const Heads& h = a.heads;
  const int dim = h.head_dim, q_rows = h.heads * dim, kv_rows = h.kv_heads * dim;
  for (int t = 0; t < in.tokens; t++)
    rms_norm(a.hidden + static_cast<int64_t>(t) * d.hidden, a.norm, d.hidden, d.eps, d.bfloat16,
             a.normed + static_cast<int64_t>(t) * d.hidden);

  struct Projection {
    const Bf16* weight;
    int rows;
    float* out;  // (T, stride)
    int stride;
  };
  const Projection projections[3] = {{a.q_weight, q_rows, a.q, q_rows},
                                     {a.k_weight, kv_rows, a.kv, 2 * kv_rows},
                                     {a.v_weight, a.v_weight ? kv_rows : 0, a.kv + kv_rows, 2 * kv_rows}};
  const Blocks of_q(q_rows, backend.threads()), of_kv(kv_rows, backend.threads());
  const int q_blocks = of_q.count(), kv_blocks = of_kv.count();
  backend.parallel(q_blocks + kv_blocks * (a.v_weight ? 2 : 1), [&](int task, int thread) {
    const int which = task < q_blocks ? 0 : 1 + (task - q_blocks) / kv_blocks;
    const int block = which == 0 ? task : (task - q_blocks) % kv_blocks;
    const Projection& p = projections[which];
    const Blocks& blocks = which == 0 ? of_q : of_kv;
    const auto x = static_cast<const float**>(backend.scratch(thread, sizeof(float*) * in.tokens));
    row_pointers(a.normed, in.tokens, d.hidden, x);
    const int first = blocks.first(block);
    mat_vec(p.weight + static_cast<int64_t>(first) * d.hidden, d.hidden, blocks.rows_of(block), x, in.tokens,
            d.hidden, [&](int row, int t, float value) {
              p.out[static_cast<int64_t>(t) * p.stride + first + row] = round_to(d.bfloat16, value);
            });
  });

  const int heads = h.heads + h.kv_heads;
  backend.parallel(in.tokens * heads, [&](int task, int) {
    const int t = task / heads, head = task % heads;
    const float* cosine = a.cosine + static_cast<int64_t>(t) * h.rotary_pairs;
    const float* sine = a.sine + static_cast<int64_t>(t) * h.rotary_pairs;
    if (head < h.heads) {
      float* q = a.q + static_cast<int64_t>(t) * q_rows + head * dim;
      rms_norm(q, a.q_norm, dim, d.eps, d.bfloat16, q);
      rope(q, dim, h.rotary_pairs, cosine, sine, d.bfloat16);
      return;
    }
    const int kv_head = head - h.heads;
    float* k = a.kv + static_cast<int64_t>(t) * 2 * kv_rows + kv_head * dim;
    float* v = k + kv_rows;
    const int64_t at = ((static_cast<int64_t>(in.slot[t]) * h.kv_heads + kv_head) * a.cache.capacity +
                        in.position[t] % a.cache.capacity) *
                       dim;
    rms_norm(a.v_weight ? v : k, nullptr, dim, d.eps, d.bfloat16, v);  // before k is normed in place
    rms_norm(k, a.k_norm, dim, d.eps, d.bfloat16, k);
    rope(k, dim, h.rotary_pairs, cosine, sine, d.bfloat16);
    to_cache(a.cache.k, at, k, dim, d.bfloat16);
    to_cache(a.cache.v, at, v, dim, d.bfloat16);
  });
}

}  // namespace tp::TP_ISA
