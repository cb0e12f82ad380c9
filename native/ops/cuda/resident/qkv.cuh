// The three projections of the normed rows. Norms of the heads, RoPE and the cache are attention's, which
// reads whole heads.
#pragma once

#include "ops/cuda/resident/products.cuh"

namespace TP_RESIDENT {

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

/// Where a projected row lies, of q or behind these of k and v, as the ops' contract has them.
struct Projections {
  float *q, *kv;
  int q_rows, kv_rows;
  __device__ Projections(const QkvRows& rows, float* q_, float* kv_)
      : q(q_), kv(kv_), q_rows(rows.q_units * kUnitRows), kv_rows(rows.kv_units * kUnitRows) {}
  __device__ float* at(int t, int row) const {
    return row < q_rows ? q + static_cast<int64_t>(t) * q_rows + row
                        : kv + static_cast<int64_t>(t) * 2 * kv_rows + row - q_rows;
  }
};

__device__ __forceinline__ void qkv(Context& c, const LayerArgs& layer) {
  const QkvArgs& a = layer.qkv;
  const QkvRows rows(a);
  const int n = c.p.dims.hidden;
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
  // A block reads few of these, so it waits for the values themselves and not for all blocks.
  const Projections to(rows, c.last ? a.q : c.p.q, c.last ? a.kv : c.p.kv);
  consume<kWholePieces>(c, schedule, kWarps, {c.acts, stride_of(2 * n)},
                        [&](int first, int units, const float* room) {
                          each_output<kUnitRows>(c, units, [&](int u, int t, int row) {
                            ptx::st_relaxed_gpu(to.at(t, schedule.unit(first + u) * kUnitRows + row),
                                                rounded(joined(room, u, t, row)));
                          });
                        });
}

/// Empties what the block has projected, which all blocks have read.
__device__ __forceinline__ void empty_projections(const Context& c, const LayerArgs& layer) {
  const QkvRows rows(layer.qkv);
  const Schedule schedule = rows.schedule(c.p);
  const Projections to(rows, c.p.q, c.p.kv);
  each_output<kUnitRows>(c, schedule.units, [&](int u, int t, int row) {
    *to.at(t, schedule.unit(u) * kUnitRows + row) = float_of(kNothing);
  });
}

}  // namespace TP_RESIDENT
