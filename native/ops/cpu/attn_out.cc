#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

void attn_out(const AttnOutArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const Blocks blocks(d.hidden, backend.threads());
  backend.parallel(blocks.count(), [&](int block, int thread) {
    const auto x = static_cast<const float**>(backend.scratch(thread, sizeof(float*) * in.tokens));
    row_pointers(a.attention, in.tokens, a.columns, x);
    const int first = blocks.first(block);
    mat_vec_leaves(a.weight + static_cast<int64_t>(first) * a.columns, a.columns, blocks.rows_of(block), x,
                   in.tokens, a.columns, d.leaves, [&](int row, int t, float value) {
                     a.sum[static_cast<int64_t>(t) * d.hidden + first + row] = value;
                   });
  });
}

}  // namespace tp::TP_ISA
