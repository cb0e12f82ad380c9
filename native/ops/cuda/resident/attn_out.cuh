#pragma once

#include "ops/cuda/resident/products.cuh"

namespace TP_RESIDENT {

/// Sums of a block's units that wait for those of other turns: (levels, units, T, rows).
inline __host__ __device__ int held_floats(int turns, int units) { return turns / 2 * units * kSumFloats; }

/// Rows as long as the attention is wide, in parts of what all warps take. Where the activations of all
/// tokens would leave the ring little room, a block goes through its units twice or more often, each time for
/// a half of the parts or less.
struct AttnOutRows {
  const Bf16* weight;
  int columns, turns;
  __device__ AttnOutRows(const AttnOutArgs& a, const Parameters& p)
      : weight(a.weight), columns(a.columns), turns(1) {
    if (p.in.tokens * stride_of(2 * columns) <= p.act_bytes && columns <= kGroup * kAttentionPart) return;
    turns = 2;
    if (kMostTurns == 2) return;
    const int units = p.by_blocks.of(p.dims.hidden / kUnitRows - 1) + 1,
              held = static_cast<int>(sizeof(float)) * held_floats(2, units);
    if (p.in.tokens * stride_of(columns) + held > p.act_bytes) turns = 4;
  }
  __device__ int part() const { return min(columns, kAttentionPart); }
  __device__ int width() const { return columns / turns; }  // of a turn
  __device__ Schedule schedule(const Parameters& p) const {
    return {p, p.dims.hidden / kUnitRows, max(width() / kAttentionPart, 1)};
  }
  __device__ const Bf16* row(int unit, int turn, int r) const {
    return weight + (static_cast<int64_t>(unit) * kUnitRows + r) * columns + turn * width();
  }
};

__device__ __forceinline__ void attn_out(Context& c, const LayerArgs& layer) {
  const AttnOutArgs& a = layer.attn_out;
  const Dims& d = c.p.dims;
  const AttnOutRows rows(a, c.p);
  const int width = rows.width(), stride = stride_of(2 * width);
  c.grid.wait(c.peers);
  c.mark(1);
  const Schedule schedule = rows.schedule(c.p);
  if (!c.last) c.next_sum();
  const int chunks = min(a.columns / kAttentionChunk, kWarps);
  float* const held = reinterpret_cast<float*>(c.acts + c.tokens * stride);
  const int level = held_floats(2, schedule.units);
#pragma unroll 1
  for (int turn = 0; turn < rows.turns; turn++) {
    if (c.first) {
      load_acts(c.acts, stride, a.attention + turn * width, c.tokens, width, a.columns);
    } else {
      fetch_acts(c.acts, stride, c.p.activations.attention + turn * width, c.tokens, width, a.columns);
      ptx::cp_async_wait_all();
    }
    sync_consumers();
    consume<kAttentionChunk / 8, true>(
        c, schedule, chunks, {c.acts, stride}, [&](int first, int units, const float* room) {
          each_output<kUnitRows, true>(c, units, [&](int u, int t, int row) {
            float x = joined_parts(room, schedule.parts, chunks, u, t, row);
            // Turns are joined as parts are: in tree order.
            float* const mine = held + ((first + u) * kMostTokens + t) * kUnitRows + row;
            if (turn % 2 > 0) x = mine[turn / 2 * level] + x;
            if (kMostTurns > 2 && turn == 3) x = mine[0] + x;
            if (turn + 1 < rows.turns) {
              mine[turn / 2 * level] = x;
              return;
            }
            const int64_t at =
                static_cast<int64_t>(t) * d.hidden + schedule.unit(first + u) * kUnitRows + row;
            if (!c.last)
              push(c.peers, c.sum_turn, at, x, t < c.tokens);
            else if (t < c.tokens)
              a.sum[at] = x;
          });
        });
  }
}

}  // namespace TP_RESIDENT
