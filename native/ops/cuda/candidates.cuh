// Tokens that may be next, and their one order as a 64-bit key: higher score first, equal scores by the lower
// token id.
#pragma once

#include "ops/cuda/block.cuh"

namespace tp::cuda {

struct Candidate {
  float score, logit, token;
};
static_assert(sizeof(Candidate) == kCandidateFloats * sizeof(float));

/// The token of an unused entry: no vocabulary is this large.
constexpr float kNoToken = 16777216.0f;

__device__ inline Candidate nothing() { return {-INFINITY, -INFINITY, kNoToken}; }

/// Smaller is better. Zeros of both signs are one score, as they compare equal.
__device__ inline unsigned long long key_of(float score, uint32_t token) {
  const uint32_t bits = bits_of(score + 0.0f);
  const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(~rising) << 32 | token;
}
__device__ inline uint32_t token_of_key(unsigned long long key) { return static_cast<uint32_t>(key); }
__device__ inline float score_of_key(unsigned long long key) {
  const uint32_t rising = ~static_cast<uint32_t>(key >> 32);
  return float_of(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

/// The least key of the block, given to all; `room` holds one key a warp.
__device__ inline unsigned long long block_min(unsigned long long key, unsigned long long* room) {
  for (int span = 16; span > 0; span /= 2) {
    const unsigned long long other = __shfl_xor_sync(~0u, key, span);
    key = other < key ? other : key;
  }
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = key;
  __syncthreads();
  for (int w = 0; w < kWarps; w++) key = room[w] < key ? room[w] : key;
  __syncthreads();
  return key;
}

}  // namespace tp::cuda
