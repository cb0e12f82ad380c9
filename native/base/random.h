// Random numbers as pure functions of a counter: nothing is drawn, everything is looked up, so every rank,
// backend and TP degree sees the same values. Integer arithmetic plus exact float steps only.
#pragma once

#include "base/math.h"

namespace tp {

TP_INLINE uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

TP_INLINE uint64_t mix64(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9u;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebu;
  x ^= x >> 31;
  return x;
}

/// What one synthetic tensor is made of; src/model/synthetic.ts says how key, scale and offset are chosen.
struct Synthetic {
  uint32_t key[2];
  float scale;  // a bfloat16 value, so that 15 bits times it is exact
  float offset;
};

/// Element of a synthetic tensor whose index has the low half `low`; `high` is mix32(high half + key[1]).
TP_INLINE Bf16 synthetic_element_low(const Synthetic& tensor, uint32_t high, uint32_t low) {
  const uint32_t h = mix32(high ^ (low * 0x9e3779b1u + tensor.key[0]));
  const int v = 2 * static_cast<int>(h >> 17) - 32767;
  return to_bf16(tensor.offset + static_cast<float>(v) * tensor.scale);
}

/// Element `index`: uniform on offset + scale * {-32767, -32765, ..., 32767}.
TP_INLINE Bf16 synthetic_element(const Synthetic& tensor, uint64_t index) {
  return synthetic_element_low(tensor, mix32(static_cast<uint32_t>(index >> 32) + tensor.key[1]),
                               static_cast<uint32_t>(index));
}

/// Standard Gumbel noise of one token of one position of one sequence: the arg max of logit/T + noise is a
/// sample.
TP_INLINE float gumbel(uint32_t seed, uint32_t sequence, uint32_t position, uint32_t token) {
  const uint32_t h = mix32(mix32(mix32(mix32(seed) + sequence) + position) + token);
  const float uniform = (static_cast<float>(h >> 9) + 0.5f) * (1.0f / 8388608.0f);  // (0, 1), exact
  return -log_f32(-log_f32(uniform));
}

/// Folds one element into a hash that does not depend on the order of the elements, so that threads may share
/// the work.
TP_INLINE uint64_t hash_element(uint32_t bits, uint64_t index) {
  return mix64((static_cast<uint64_t>(bits) << 32 | bits) ^ (index + 1) * 0x9e3779b97f4a7c15u);
}

}  // namespace tp
