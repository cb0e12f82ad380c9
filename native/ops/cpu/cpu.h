// The ops of one instruction set. Every file of this folder but pool and backend is compiled once per set,
// with TP_ISA naming the namespace; no op contains intrinsics, those are in lanes.h.
#pragma once

#include "ops/backend.h"
#include "ops/cpu/dot.h"

namespace tp::TP_ISA {

void angles(const AnglesArgs&, const Dims&, const Input&, Backend&);
void embed(const EmbedArgs&, const Dims&, const Input&, Backend&);
void qkv(const QkvArgs&, const Dims&, const Input&, Backend&);
void attention(const AttentionArgs&, const Dims&, const Input&, Backend&);
void attn_out(const AttnOutArgs&, const Dims&, const Input&, Backend&);
void route(const RouteArgs&, const Dims&, const Input&, Backend&);
void gate_up(const GateUpArgs&, const Dims&, const Input&, Backend&);
void down(const DownArgs&, const Dims&, const Input&, Backend&);
void ffn_out(const FfnOutArgs&, const Dims&, const Input&, Backend&);
void logits(const LogitsArgs&, const Dims&, const Input&, Backend&);
void sample(const SampleArgs&, const Dims&, const Input&, Backend&);
void advance(const AdvanceArgs&, const Dims&, const Input&, Backend&);
void note_time(uint64_t* ns, Backend&);
void synthesize(const Synthetic&, const Stretch&, Bf16* out, Backend&);
uint64_t stream(const void* memory, uint64_t bytes, Backend&);
const Ops& ops();

/// Weight rows that one task takes: enough to stream, few enough to share out evenly.
constexpr int kBlockRows = 32;

TP_INLINE int blocks_of(int rows) { return (rows + kBlockRows - 1) / kBlockRows; }
TP_INLINE int rows_in_block(int rows, int block) {
  const int left = rows - block * kBlockRows;
  return left < kBlockRows ? left : kBlockRows;
}

/// Pointers to T rows of `width`, in scratch memory.
TP_INLINE void row_pointers(const float* rows, int count, int64_t width, const float** out) {
  for (int t = 0; t < count; t++) out[t] = rows + t * width;
}

}  // namespace tp::TP_ISA
