// The three projections of the normed rows. Norms of the heads, RoPE and the cache are attention's, which
// reads whole heads.
#pragma once

#include "ops/cuda/resident/products.cuh"

namespace tp::cuda::resident {

struct QkvRows {
  const Bf16 *q, *k, *v;  // v null: k serves as both
  int q_units, kv_units;
  __device__ explicit QkvRows(const QkvArgs& a)
      : q(a.q_weight),
        k(a.k_weight),
        v(a.v_weight),
        q_units(a.heads.heads * a.heads.head_dim / kUnitRows),
        kv_units(a.heads.kv_heads * a.heads.head_dim / kUnitRows) {}
  __device__ Schedule schedule(const Parameters& p) const { return {p, q_units + (v ? 2 : 1) * kv_units, 1}; }
  __device__ const Bf16* row(int unit, int r, int hidden) const {
    const bool of_q = unit < q_units, of_k = unit < q_units + kv_units;
    const int64_t at = (of_q ? unit : unit - q_units - (of_k ? 0 : kv_units)) * kUnitRows + r;
    return (of_q ? q : of_k ? k : v) + at * hidden;
  }
};

__device__ __forceinline__ void qkv(Context& c, const LayerArgs& layer) {
  const QkvArgs& a = layer.qkv;
  const QkvRows rows(a);
  const int n = c.p.dims.hidden, q_rows = rows.q_units * kUnitRows, kv_rows = rows.kv_units * kUnitRows;
  if (!c.first && !c.alone()) c.early.wait(c.peers);
  c.mark(1);
  if (c.first) {
    load_normed(c, a.hidden, a.norm);
  } else if (!c.alone()) {
    fetch_acts(c.acts, stride_of(2 * n), c.p.activations.normed, c.tokens, n, n);
    ptx::cp_async_wait_all();
  }
  sync_consumers();
  const Schedule schedule = rows.schedule(c.p);
  consume<kWholePieces>(c, schedule, kWarps, {c.acts, stride_of(2 * n)},
                        [&](int first, int units, const float* room) {
                          each_output<kUnitRows>(c, units, [&](int u, int t, int row) {
                            const float x = rounded(joined(room, u, t, row));
                            const int at = schedule.unit(first + u) * kUnitRows + row;
                            if (at < q_rows)
                              a.q[static_cast<int64_t>(t) * q_rows + at] = x;
                            else
                              a.kv[static_cast<int64_t>(t) * 2 * kv_rows + at - q_rows] = x;  // k, then v
                          });
                        });
  c.grid.arrive();
  c.grid.expect(gridDim.x);
}

}  // namespace tp::cuda::resident
