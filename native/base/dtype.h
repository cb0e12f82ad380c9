// bfloat16 as stored bits, and its one rounding: to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/inline.h"
#ifdef __CUDACC__
#include "base/ptx.cuh"
#endif

namespace tp {

using Bf16 = uint16_t;

TP_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

TP_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

TP_INLINE float to_float(Bf16 bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

/// Rounds to bfloat16. NaN stays NaN (quiet), infinities stay.
TP_INLINE Bf16 to_bf16(float value) {
#ifdef __CUDA_ARCH__
  return ptx::cvt_rn_bf16(value);
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<Bf16>(nan ? (bits >> 16) | 0x40u : rounded);
#endif
}

/// An activation at one of the reference's rounding points: bfloat16-valued in bfloat16 runs, untouched in
/// float32 runs.
TP_INLINE float round_to(bool bfloat16, float value) { return bfloat16 ? to_float(to_bf16(value)) : value; }

}  // namespace tp
