// The matrix ops for many tokens: kernels that read every weight once for all of them (grouped.cuh). For
// bfloat16 runs and rows that the tiles can cut; everything else goes eight columns at a time (gemv.cuh).
#pragma once

#include "ops/cuda/cuda.h"
#include "ops/cuda/matrix.h"

namespace tp::cuda::grouped {

/// Above so many tokens weights are read once for all of them, up to so many eight at a time, where a
/// sequence's bits do not depend on those beside it. Measured with the 26B shape: experts alone would take
/// less time together from 4 tokens on, of 16 all ops do by far.
constexpr int kCrossover = kChunk;
/// Above so many tokens tiles are made for multiplying, up to so many for reading weights.
constexpr int kFew = 64;
/// Up to so many tokens narrow tiles hold all of them.
constexpr int kNarrow = 32;

/// THE choice between the two ways.
inline bool chosen(const Dims& d, int tokens) { return d.bfloat16 && tokens > kCrossover; }
/// Whether rows of such sums can be cut into pieces of 64 or 88 elements.
inline bool cut_64(int length) { return length % 64 == 0; }
inline bool cut_88(int length) { return length % 88 == 0; }

inline bool takes(const QkvArgs& a, const Dims& d, int tokens) {
  return chosen(d, tokens) && cut_64(d.hidden) && a.heads.kv_heads * a.heads.head_dim % 8 == 0;
}
bool takes(const AttentionArgs&, const Dims&, int tokens);
inline bool takes(const AttnOutArgs& a, const Dims& d, int tokens) {
  return chosen(d, tokens) && cut_64(a.columns / d.leaves) && d.hidden % 8 == 0;
}
inline bool takes(const RouteArgs&, const Dims& d, int tokens) {
  return chosen(d, tokens) && cut_64(d.hidden) && d.experts % 8 == 0;
}
inline bool fits(const GateUpArgs&, const Dims& d) {
  return cut_64(d.hidden) && d.inter % 8 == 0 && d.moe_inter % 8 == 0;
}
inline bool takes(const GateUpArgs& a, const Dims& d, int tokens) { return chosen(d, tokens) && fits(a, d); }
inline bool fits(const DownArgs&, const Dims& d) {
  return cut_88(d.inter / d.leaves) && cut_88(d.moe_inter / d.leaves) && d.hidden % 8 == 0;
}
inline bool takes(const DownArgs& a, const Dims& d, int tokens) { return chosen(d, tokens) && fits(a, d); }
inline bool takes(const LogitsArgs&, const Dims& d, int rows) {
  return chosen(d, rows) && cut_64(d.hidden) && d.local_vocab % 8 == 0;
}

/// What follows takes any number of tokens. The norm and the three projections, before the heads' own norms.
void project(const QkvArgs&, const Dims&, const Input&, CudaBackend&);
void attention(const AttentionArgs&, const Dims&, const Input&, CudaBackend&);
void attn_out(const AttnOutArgs&, const Dims&, const Input&, CudaBackend&);
void route(const RouteArgs&, const Dims&, const Input&, CudaBackend&);
void gate_up(const GateUpArgs&, const Dims&, const Input&, CudaBackend&);
void down(const DownArgs&, const Dims&, const Input&, CudaBackend&);
/// The norm and the head, before the leaves' summaries.
void head(const LogitsArgs&, const Dims&, const Input&, CudaBackend&);

}  // namespace tp::cuda::grouped
