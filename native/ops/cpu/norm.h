// RMSNorm, one formula everywhere: x (mean(x^2) + eps)^-1/2 weight, all in fp32; the caller rounds.
#pragma once

#include "ops/cpu/lanes.h"

namespace tp::TP_ISA {

/// (mean(x^2) + eps)^-1/2 over n elements.
TP_INLINE float inverse_rms(const float* x, int n, float eps) {
  Lanes squares = zero();
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) squares = fused(load(x + i), load(x + i), squares);
  if (i < n) {
    const Lanes tail = load_tail(x + i, n - i);
    squares = fused(tail, tail, squares);
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps);
}

/// out = r(norm(x) * weight); weight null: without. In place is fine.
TP_INLINE void rms_norm(const float* x, const Bf16* weight, int n, float eps, bool bfloat16, float* out) {
  const float inverse = inverse_rms(x, n, eps);
  for (int i = 0; i < n; i++) {
    const float normed = x[i] * inverse;
    out[i] = round_to(bfloat16, weight ? normed * to_float(weight[i]) : normed);
  }
}

}  // namespace tp::TP_ISA
