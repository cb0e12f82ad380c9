#pragma once

#include "ops/cuda/resident/products.cuh"

namespace tp::cuda::resident {

/// Rows as long as the attention is wide, in parts of what all warps take. Where the activations of all
/// tokens would leave the ring little room, a block goes through its units twice, each time for half the
/// parts.
struct AttnOutRows {
  const Bf16* weight;
  int columns, turns;
  __device__ AttnOutRows(const AttnOutArgs& a, const Parameters& p)
      : weight(a.weight),
        columns(a.columns),
        turns(p.in.tokens * stride_of(2 * a.columns) > p.act_bytes ? 2 : 1) {}
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
  float* const halves =
      reinterpret_cast<float*>(c.acts + c.tokens * stride);  // (units, T, rows) of two turns
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
            float& half = halves[((first + u) * kMostTokens + t) * kUnitRows + row];
            if (turn + 1 < rows.turns) {
              half = x;
              return;
            }
            if (turn > 0) x = half + x;
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

}  // namespace tp::cuda::resident
