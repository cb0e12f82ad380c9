// Gate and up projections and GELU(gate) * up. The dense MLP and the chosen experts are one list of row
// blocks; an expert's rows are read once for all the tokens that chose it.
#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

namespace {

/// act[m] of `rows` columns from gate and up rows of n elements: the two halves of a tile see the same
/// tokens.
template <class Out>
TP_INLINE void gated(const Bf16* gate, const Bf16* up, int rows, const float* const* x, int tokens, int n,
                     bool bfloat16, Out&& out) {
  const int64_t apart = up - gate;
  for (int row = 0; row < rows; row++) {
    const auto tile = [&]<int M>(int token) {
      Lanes acc[2][M];
      clear(acc);
      dot_tile(gate + static_cast<int64_t>(row) * n, apart, x + token, n, acc);
      for (int m = 0; m < M; m++) {
        const float g = round_to(bfloat16, sum(acc[0][m])), u = round_to(bfloat16, sum(acc[1][m]));
        out(row, token + m, round_to(bfloat16, round_to(bfloat16, gelu_tanh(g)) * u));
      }
    };
    int m = 0;
    for (; m + 3 <= tokens; m += 3) tile.template operator()<3>(m);
    if (tokens - m == 2) tile.template operator()<2>(m);
    if (tokens - m == 1) tile.template operator()<1>(m);
  }
}

}  // namespace

void gate_up(const GateUpArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const int n = d.hidden, threads = backend.threads();
  // A token's experts are shared out side by side.
  const Blocks of_dense(d.inter, threads), of_expert(d.moe_inter, (threads + d.top_k - 1) / d.top_k);
  const int dense_blocks = of_dense.count(), expert_blocks = of_expert.count();
  backend.parallel(dense_blocks + d.experts * expert_blocks, [&](int task, int thread) {
    const auto x = static_cast<const float**>(backend.scratch(thread, sizeof(float*) * in.tokens));
    if (task < dense_blocks) {
      row_pointers(a.dense_in, in.tokens, n, x);
      const int first = of_dense.first(task);
      const int64_t from = static_cast<int64_t>(first) * n;
      gated(a.gate + from, a.up + from, of_dense.rows_of(task), x, in.tokens, n, d.bfloat16,
            [&](int row, int t, float value) {
              a.dense_act[static_cast<int64_t>(t) * d.inter + first + row] = value;
            });
      return;
    }
    const int expert = (task - dense_blocks) / expert_blocks, block = (task - dense_blocks) % expert_blocks;
    const int* assigned = a.assignment + a.expert_start[expert];
    const int tokens = a.expert_start[expert + 1] - a.expert_start[expert];
    if (tokens == 0) return;
    for (int m = 0; m < tokens; m++) x[m] = a.expert_in + static_cast<int64_t>(assigned[m] / d.top_k) * n;
    const int first = of_expert.first(block);
    const Bf16* gate = a.expert_gate_up + (static_cast<int64_t>(expert) * 2 * d.moe_inter + first) * n;
    gated(gate, gate + static_cast<int64_t>(d.moe_inter) * n, of_expert.rows_of(block), x, tokens, n,
          d.bfloat16, [&](int row, int m, float value) {
            a.expert_act[static_cast<int64_t>(assigned[m]) * d.moe_inter + first + row] = value;
          });
  });
}

}  // namespace tp::TP_ISA
