#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

void embed(const EmbedArgs& a, const Dims& d, const Input& in, Backend&) {
  for (int t = 0; t < in.tokens; t++) {
    const Bf16* row = a.table + static_cast<int64_t>(in.token[t]) * d.hidden;
    for (int i = 0; i < d.hidden; i++)
      a.hidden[static_cast<int64_t>(t) * d.hidden + i] = round_to(d.bfloat16, to_float(row[i]) * a.scale);
  }
}

}  // namespace tp::TP_ISA
