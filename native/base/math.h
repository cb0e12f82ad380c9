// exp, log, tanh and GELU in plain fp32 arithmetic with explicit fused multiply-adds: the same bits from
// every compiler, instruction set and backend, which libm does not promise. Errors are about 1 unit in the
// last place.
#pragma once

#include <cmath>

#include "base/dtype.h"

namespace tp {

TP_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

/// e^x. 0 below -87.3 (no subnormals), +inf above 88.7; NaN stays NaN.
TP_INLINE float exp_f32(float x) {
  // x = n ln 2 + r with n whole: adding and taking away 1.5 * 2^23 rounds to a whole number.
  const float clamped = x < -87.33654f ? -87.33654f : (x > 88.72283f ? 88.72283f : x);
  const float magic = 12582912.0f;
  const float n = fused(clamped, 1.44269504f, magic) - magic;
  float r = fused(n, -0.693359375f, clamped);
  r = fused(n, 2.12194440e-4f, r);
  // Cephes polynomial for e^r on [-ln2/2, ln2/2].
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.0f;
  // Times 2^n in two halves, so that n = 128 does not overflow on the way.
  const int whole = static_cast<int>(n);
  const int half = whole >> 1;
  const float y = p * float_of(static_cast<uint32_t>(half + 127) << 23) *
                  float_of(static_cast<uint32_t>(whole - half + 127) << 23);
  return x < -87.33654f ? 0.0f : (x > 88.72283f ? float_of(0x7f800000u) : (x == x ? y : x));
}

/// Natural logarithm of a positive normal number.
TP_INLINE float log_f32(float x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)).
  uint32_t bits = bits_of(x);
  int e = static_cast<int>(bits >> 23) - 126;
  float m = float_of((bits & 0x007fffffu) | 0x3f000000u);
  const bool low = m < 0.707106781f;
  e -= low ? 1 : 0;
  m = (low ? m + m : m) - 1.0f;
  float p = 7.0376836292e-2f;
  p = fused(p, m, -1.1514610310e-1f);
  p = fused(p, m, 1.1676998740e-1f);
  p = fused(p, m, -1.2420140846e-1f);
  p = fused(p, m, 1.4249322787e-1f);
  p = fused(p, m, -1.6668057665e-1f);
  p = fused(p, m, 2.0000714765e-1f);
  p = fused(p, m, -2.4999993993e-1f);
  p = fused(p, m, 3.3333331174e-1f);
  const float z = m * m;
  const float n = static_cast<float>(e);
  float y = p * (m * z);
  y = fused(n, -2.12194440e-4f, y);
  y = fused(-0.5f, z, y);
  return fused(n, 0.693359375f, m + y);
}

TP_INLINE float tanh_f32(float x) {
  const float a = x < 0 ? -x : x;
  if (a < 0.625f) {  // the quotient below would lose the relative precision of small values
    const float z = x * x;
    float p = -5.70498872745e-3f;
    p = fused(p, z, 2.06390887954e-2f);
    p = fused(p, z, -5.37397155531e-2f);
    p = fused(p, z, 1.33314422036e-1f);
    p = fused(p, z, -3.33332819422e-1f);
    return fused(p * z, x, x);
  }
  const float t = 1.0f - 2.0f / (exp_f32(a + a) + 1.0f);
  return x < 0 ? -t : t;
}

/// GELU, tanh form: 0.5 z (1 + tanh u) = z / (1 + e^-2u), u = sqrt(2/pi) (z + 0.044715 z^3).
TP_INLINE float gelu_tanh(float z) {
  const float u = 0.797884561f * fused(0.044715f * z * z, z, z);
  return z / (1.0f + exp_f32(-2.0f * u));
}

}  // namespace tp
