// This rank's rows of the vocabulary head, times the normed rows.
#pragma once

#include "ops/cuda/resident/products.cuh"

namespace TP_RESIDENT {

__device__ inline Schedule logits_schedule(const Parameters& p) {
  return Schedule::drawing(p, p.dims.local_vocab / kUnitRows);
}

__device__ __forceinline__ void logits(Context& c) {
  const LogitsArgs& a = c.p.logits;
  const Dims& d = c.p.dims;
  const int n = d.hidden;
  c.tokens = c.p.in.rows;  // columns are rows of logits from here on
  if (!c.first && !c.alone()) c.early.wait(c.peers);
  c.mark(1);
  if (c.first) {
    load_normed(c, a.hidden, a.norm, c.p.in.row);
  } else if (!c.alone()) {
    fetch_acts(c.acts, stride_of(2 * n), c.p.activations.normed, c.tokens, n, n, c.p.in.row);
    ptx::cp_async_wait_all();
  }
  sync_consumers();
  const Schedule schedule = logits_schedule(c.p);
  consume<kWholePieces>(c, schedule, kWarps, {c.acts, stride_of(2 * n)}, [&](int, int units, float* room) {
    each_output<kUnitRows>(c, units, [&](int u, int row_of_logits, int row) {
      const float x = joined(room, u, row_of_logits, row);
      a.logits[static_cast<int64_t>(row_of_logits) * d.local_vocab + unit_in(room, u) * kUnitRows + row] =
          d.softcap > 0 ? d.softcap * tanh_f32(x / d.softcap) : x;
    });
  });
}

}  // namespace TP_RESIDENT
