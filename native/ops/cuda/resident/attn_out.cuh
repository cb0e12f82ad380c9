#pragma once

#include "ops/cuda/resident/products.cuh"

namespace tp::cuda::resident {

struct AttnOutRows {
  const Bf16* weight;
  int columns;
  __device__ int part() const { return min(columns, kAttentionPart); }
  __device__ Schedule schedule(const Parameters& p) const {
    return {p, p.dims.hidden / kUnitRows, max(columns / kAttentionPart, 1)};
  }
  __device__ const Bf16* row(int unit, int part, int r) const {
    return weight + (static_cast<int64_t>(unit) * kUnitRows + r) * columns + part * this->part();
  }
};

__device__ __forceinline__ void attn_out(Context& c, const LayerArgs& layer) {
  const AttnOutArgs& a = layer.attn_out;
  const Dims& d = c.p.dims;
  const AttnOutRows rows{a.weight, a.columns};
  const int stride = stride_of(2 * a.columns);
  c.grid.wait(c.peers);
  c.mark(1);
  if (c.first) {
    load_acts(c.acts, stride, a.attention, c.tokens, a.columns);
  } else {
    fetch_acts(c.acts, stride, c.p.activations.attention, c.tokens, a.columns);
    ptx::cp_async_wait_all();
  }
  sync_consumers();
  const Schedule schedule = rows.schedule(c.p);
  if (!c.last) c.next_sum();
  const int chunks = min(a.columns / kAttentionChunk, kWarps);
  consume<kAttentionChunk / 8, true>(
      c, schedule, chunks, {c.acts, stride}, [&](int first, int units, const float* room) {
        each_output<kUnitRows, true>(c, units, [&](int u, int t, int row) {
          const float x = joined_parts(room, schedule.parts, chunks, u, t, row);
          const int64_t at = static_cast<int64_t>(t) * d.hidden + schedule.unit(first + u) * kUnitRows + row;
          if (!c.last)
            push(c.peers, c.sum_turn, at, x, t < c.tokens);
          else if (t < c.tokens)
            a.sum[at] = x;
        });
      });
}

}  // namespace tp::cuda::resident
