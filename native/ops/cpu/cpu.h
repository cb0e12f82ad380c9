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

/// Weight rows shared out to `threads`, a block a task: long runs of memory stream faster (256 rows 12 %
/// faster than 32), and about eight blocks a thread end nearly together.
struct Blocks {
  int rows, each;
  Blocks(int rows_, int threads) : rows(rows_), each((rows_ + 8 * threads - 1) / (8 * threads)) {
    each = each < 32 ? 32 : each > 256 ? 256 : (each + 3) & ~3;
  }
  int count() const { return (rows + each - 1) / each; }
  int first(int block) const { return block * each; }
  int rows_of(int block) const { return rows - first(block) < each ? rows - first(block) : each; }
};

/// Pointers to T rows of `width`, in scratch memory.
TP_INLINE void row_pointers(const float* rows, int count, int64_t width, const float** out) {
  for (int t = 0; t < count; t++) out[t] = rows + t * width;
}

}  // namespace tp::TP_ISA
