// One query against its visible positions: scores, softmax, weighted sum of v. Each (token, head) is one
// task, and all sums run from the first visible position to the last, so neither the batch nor the chunk
// changes a bit.
#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

namespace {

constexpr int kColumns = 4 * kLanes;  // columns of v that stay in registers while positions pass by

template <class Element>
void attend(const float* q, const Element* k, const Element* v, int capacity, int dim, int first, int last,
            float* score, float* out, bool bfloat16) {
  const int visible = last - first + 1;
  float max = -__builtin_inff();
  for (int j = 0; j < visible; j++) {
    Lanes acc[1][1];
    clear(acc);
    dot_tile(k + static_cast<int64_t>((first + j) % capacity) * dim, dim, &q, dim, acc, dim);
    score[j] = sum(acc[0][0]);
    max = score[j] > max ? score[j] : max;
  }
  for (int j = 0; j < visible; j++) score[j] = exp_f32(score[j] - max);
  Lanes sums = zero();
  int j = 0;
  for (; j + kLanes <= visible; j += kLanes) sums = add(sums, load(score + j));
  if (j < visible) sums = add(sums, load_tail(score + j, visible - j));
  const float total = sum(sums);

  for (int c = 0; c < dim; c += kColumns) {
    const int lanes = dim - c < kColumns ? (dim - c + kLanes - 1) / kLanes : 4;
    Lanes acc[4] = {zero(), zero(), zero(), zero()};
    for (j = 0; j < visible; j++) {
      const Element* row = v + static_cast<int64_t>((first + j) % capacity) * dim + c;
      const Lanes p = broadcast(score[j]);
      for (int l = 0; l < lanes; l++) {
        const int left = dim - c - l * kLanes;
        acc[l] =
            fused(p, left >= kLanes ? load(row + l * kLanes) : load_tail(row + l * kLanes, left), acc[l]);
      }
    }
    float columns[kColumns];
    for (int l = 0; l < 4; l++) store(columns + l * kLanes, acc[l]);
    for (int i = 0; i < kColumns && c + i < dim; i++) out[c + i] = round_to(bfloat16, columns[i] / total);
  }
}

}  // namespace

void attention(const AttentionArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const Heads& h = a.heads;
  const int dim = h.head_dim, group = h.heads / h.kv_heads;
  backend.parallel(in.tokens * h.heads, [&](int task, int thread) {
    const int t = task / h.heads, head = task % h.heads;
    const int last = in.position[t];
    const int first = h.window > 0 && last >= h.window ? last - h.window + 1 : 0;
    const auto score = static_cast<float*>(backend.scratch(thread, sizeof(float) * (last - first + 1)));
    const int64_t row = static_cast<int64_t>(t) * h.heads * dim + head * dim;
    const int64_t cache =
        (static_cast<int64_t>(in.slot[t]) * h.kv_heads + head / group) * a.cache.capacity * dim;
    if (d.bfloat16)
      attend(a.q + row, static_cast<const Bf16*>(a.cache.k) + cache,
             static_cast<const Bf16*>(a.cache.v) + cache, a.cache.capacity, dim, first, last, score,
             a.attention + row, true);
    else
      attend(a.q + row, static_cast<const float*>(a.cache.k) + cache,
             static_cast<const float*>(a.cache.v) + cache, a.cache.capacity, dim, first, last, score,
             a.attention + row, false);
  });
}

}  // namespace tp::TP_ISA
