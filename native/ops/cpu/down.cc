// Down projections. Dense: like attn_out. Experts: for every row, leaf and token the experts are added lane
// by lane in the order of their ids, weighted; then the lanes, then the tree over the leaves.
#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

namespace {

constexpr int kRows = 4;  // rows of every chosen expert that a task takes at a time

/// Adds weight * (rows . act), leaf by leaf, to sums[token][leaf][row] for the tokens assigned to one expert.
template <int R>
TP_INLINE void add_expert(const Bf16* weight, const DownArgs& a, const Dims& d, const int* assigned,
                          int count, Lanes* sums) {
  const int leaf = d.moe_inter / d.leaves;
  const auto tile = [&]<int M>(int first) {
    for (int l = 0; l < d.leaves; l++) {
      const float* x[M];
      for (int m = 0; m < M; m++)
        x[m] = a.expert_act + static_cast<int64_t>(assigned[first + m]) * d.moe_inter + l * leaf;
      Lanes acc[R][M];
      clear(acc);
      dot_tile(weight + l * leaf, d.moe_inter, x, leaf, acc, M == 1 ? R * d.moe_inter : 0);
      for (int m = 0; m < M; m++) {
        const int assignment = assigned[first + m];
        const Lanes scale = broadcast(a.route_weight[assignment]);
        Lanes* into = sums + (static_cast<int64_t>(assignment / d.top_k) * d.leaves + l) * kRows;
        for (int r = 0; r < R; r++) into[r] = fused(scale, acc[r][m], into[r]);
      }
    }
  };
  int m = 0;
  if constexpr (R <= 2) {
    for (; m + 3 <= count; m += 3) tile.template operator()<3>(m);
  }
  for (; m < count; m++) tile.template operator()<1>(m);
}

template <int R>
void expert_rows(const DownArgs& a, const Dims& d, int tokens, int row, Lanes* sums) {
  for (int i = 0; i < tokens * d.leaves * kRows; i++) sums[i] = zero();
  for (int e = 0; e < d.experts; e++) {
    const int count = a.expert_start[e + 1] - a.expert_start[e];
    if (count == 0) continue;
    const Bf16* weight = a.expert_down + (static_cast<int64_t>(e) * d.hidden + row) * d.moe_inter;
    add_expert<R>(weight, a, d, a.assignment + a.expert_start[e], count, sums);
  }
  for (int t = 0; t < tokens; t++) {
    for (int r = 0; r < R; r++) {
      float leaves[kMaxLeaves] = {};
      for (int l = 0; l < d.leaves; l++)
        leaves[l] = sum(sums[(static_cast<int64_t>(t) * d.leaves + l) * kRows + r]);
      a.sum[(static_cast<int64_t>(t) * 2 + 1) * d.hidden + row + r] = tree_sum(leaves, d.leaves);
    }
  }
}

}  // namespace

void down(const DownArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const Blocks blocks(d.hidden, backend.threads());
  const int count = blocks.count();
  backend.parallel(2 * count, [&](int task, int thread) {
    const int block = task % count, first = blocks.first(block), rows = blocks.rows_of(block);
    if (task < count) {
      const auto x = static_cast<const float**>(backend.scratch(thread, sizeof(float*) * in.tokens));
      row_pointers(a.dense_act, in.tokens, d.inter, x);
      mat_vec_leaves(a.down + static_cast<int64_t>(first) * d.inter, d.inter, rows, x, in.tokens, d.inter,
                     d.leaves, [&](int row, int t, float value) {
                       a.sum[static_cast<int64_t>(t) * 2 * d.hidden + first + row] = value;
                     });
      return;
    }
    const auto sums =  // (T, leaves, kRows)
        static_cast<Lanes*>(backend.scratch(thread, sizeof(Lanes) * in.tokens * d.leaves * kRows));
    int row = 0;
    for (; row + kRows <= rows; row += kRows) {
      if (in.tokens == 1) {
        expert_rows<kRows>(a, d, in.tokens, first + row, sums);
      } else {
        expert_rows<2>(a, d, in.tokens, first + row, sums);
        expert_rows<2>(a, d, in.tokens, first + row + 2, sums);
      }
    }
    for (; row < rows; row++) expert_rows<1>(a, d, in.tokens, first + row, sums);
  });
}

}  // namespace tp::TP_ISA
