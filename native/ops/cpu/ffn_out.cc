#include "ops/cpu/cpu.h"
#include "ops/cpu/norm.h"

namespace tp::TP_ISA {

void ffn_out(const FfnOutArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const int n = d.hidden;
  const float scalar = to_float(*a.layer_scalar);
  backend.parallel(in.tokens, [&](int t, int thread) {
    const float* sum = a.sum + static_cast<int64_t>(t) * 2 * n;
    float* hidden = a.hidden + static_cast<int64_t>(t) * n;
    const auto dense = static_cast<float*>(backend.scratch(thread, sizeof(float) * 2 * n));
    float* experts = dense + n;
    for (int i = 0; i < 2 * n; i++) dense[i] = round_to(d.bfloat16, sum[i]);
    rms_norm(dense, a.dense_norm, n, d.eps, d.bfloat16, dense);
    rms_norm(experts, a.expert_norm, n, d.eps, d.bfloat16, experts);
    for (int i = 0; i < n; i++) dense[i] = round_to(d.bfloat16, dense[i] + experts[i]);
    rms_norm(dense, a.norm, n, d.eps, d.bfloat16, dense);
    for (int i = 0; i < n; i++)
      hidden[i] = round_to(d.bfloat16, round_to(d.bfloat16, hidden[i] + dense[i]) * scalar);
  });
}

}  // namespace tp::TP_ISA
