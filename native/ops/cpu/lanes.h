// Sixteen fp32 accumulators, the unit of every sum on the CPU. Element i of a sum goes to lane i % 16 by a
// fused multiply-add; the lanes meet in a tree (i with i+8, i+4, i+2, i+1). AVX-512 holds them in one
// register, AVX2 in two, plain C++ in an array: the arithmetic, and so the bits, are the same in all three.
#pragma once

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "base/math.h"

namespace tp::TP_ISA {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct Lanes {
  __m512 v;
};
TP_INLINE Lanes zero() { return {_mm512_setzero_ps()}; }
TP_INLINE Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
TP_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
TP_INLINE Lanes load(const Bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
TP_INLINE Lanes load_half(const float* p) { return {_mm512_zextps256_ps512(_mm256_loadu_ps(p))}; }
TP_INLINE Lanes load_half(const Bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_zextsi128_si256(raw)), 16))};
}
TP_INLINE void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
TP_INLINE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
TP_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TP_INLINE __m256 fold(Lanes a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v),
                       _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
}

#elif defined(__AVX2__)

struct Lanes {
  __m256 low, high;
};
TP_INLINE Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TP_INLINE Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TP_INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TP_INLINE __m256 load8(const Bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
TP_INLINE Lanes load(const Bf16* p) { return {load8(p), load8(p + 8)}; }
TP_INLINE Lanes load_half(const float* p) { return {_mm256_loadu_ps(p), _mm256_setzero_ps()}; }
TP_INLINE Lanes load_half(const Bf16* p) { return {load8(p), _mm256_setzero_ps()}; }
TP_INLINE void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
TP_INLINE Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
TP_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
TP_INLINE __m256 fold(Lanes a) { return _mm256_add_ps(a.low, a.high); }

#else

struct Lanes {
  float v[kLanes];
};
TP_INLINE Lanes zero() { return {}; }
TP_INLINE Lanes broadcast(float x) {
  Lanes a;
  for (float& lane : a.v) lane = x;
  return a;
}
TP_INLINE float as_float(float x) { return x; }
TP_INLINE float as_float(Bf16 x) { return to_float(x); }
template <class T>
TP_INLINE Lanes load(const T* p) {
  Lanes a;
  for (int i = 0; i < kLanes; i++) a.v[i] = as_float(p[i]);
  return a;
}
template <class T>
TP_INLINE Lanes load_half(const T* p) {
  Lanes a = {};
  for (int i = 0; i < kLanes / 2; i++) a.v[i] = as_float(p[i]);
  return a;
}
TP_INLINE void store(float* p, Lanes a) { memcpy(p, a.v, sizeof a.v); }
TP_INLINE Lanes add(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; i++) a.v[i] += b.v[i];
  return a;
}
TP_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < kLanes; i++) c.v[i] = tp::fused(a.v[i], b.v[i], c.v[i]);
  return c;
}

#endif

/// Sum of the lanes: i with i+8, then i+4, i+2, i+1.
TP_INLINE float sum(Lanes a) {
#if defined(__AVX2__)
  const __m256 eight = fold(a);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  for (int span = kLanes / 2; span > 0; span /= 2)
    for (int i = 0; i < span; i++) a.v[i] += a.v[i + span];
  return a.v[0];
#endif
}

/// The first n < 16 elements, zeros behind them.
template <class T>
TP_INLINE Lanes load_tail(const T* p, int n) {
  if (n == kLanes / 2) return load_half(p);
  T padded[kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

}  // namespace tp::TP_ISA
