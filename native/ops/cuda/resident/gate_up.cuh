// Gate and up projections and GELU(gate) * up. A unit is four columns: their gate rows, then their up rows.
#pragma once

#include "ops/cuda/resident/qkv.cuh"
#include "ops/cuda/resident/route.cuh"

namespace TP_RESIDENT {

struct GateUpRows {
  const Bf16 *gate, *up, *experts;
  int hidden, inter, moe;
  __device__ GateUpRows(const GateUpArgs& a, const Dims& d)
      : gate(a.gate),
        up(a.up),
        experts(a.expert_gate_up),
        hidden(d.hidden),
        inter(d.inter),
        moe(d.moe_inter) {}
  __device__ int expert_units() const { return moe / kUnitColumns; }
  __device__ Schedule dense_schedule(const Parameters& p) const { return {p, inter / kUnitColumns, 1}; }
  /// Begins where the dense units ended, so that no block has more than one unit above its share.
  __device__ Schedule expert_schedule(const Parameters& p, int count) const {
    return Schedule::drawing(p, count * expert_units(), inter / kUnitColumns);
  }
  __device__ const Bf16* dense_row(int unit, int r) const {
    return (r < kUnitColumns ? gate : up) + (int64_t{unit} * kUnitColumns + r % kUnitColumns) * hidden;
  }
  __device__ const Bf16* expert_row(int expert, int unit, int r) const {
    const int row = (r < kUnitColumns ? 0 : moe) + unit * kUnitColumns + r % kUnitColumns;
    return experts + (int64_t{expert} * 2 * moe + row) * hidden;
  }
};

__device__ __forceinline__ float gated(const float* room, int unit, int token, int column) {
  const float gate = rounded(joined(room, unit, token, column)),
              up = rounded(joined(room, unit, token, kUnitColumns + column));
  return rounded(rounded(gelu_tanh(gate)) * up);
}

__device__ __forceinline__ void gate_up(Context& c, const LayerArgs& layer) {
  const GateUpArgs& a = layer.gate_up;
  const Dims& d = c.p.dims;
  const GateUpRows rows(a, d);
  const int stride = stride_of(2 * d.hidden);
  // The experts come first: their weights can then be on their way behind the dense products.
  choose(c, layer.route, !c.first, blockIdx.x == 0);
  c.mark(1);
  ptx::cp_async_wait_all();  // that the router's stage began
#pragma unroll
  for (const bool dense : {true, false}) {
    char* const room = c.first || dense ? nullptr : c.expert_room(stride);
    char* const in = room ? room : c.acts;
    if (c.first) {
      const RouteArgs& route = layer.route;
      load_normed(c, route.hidden, dense ? route.dense_norm : route.expert_norm);
    } else if (!dense && !room) {
      fetch_acts(in, stride, c.p.activations.expert_in, c.tokens, d.hidden, d.hidden);
      ptx::cp_async_wait_all();
    }
    sync_consumers();
    const Schedule schedule = dense ? rows.dense_schedule(c.p) : rows.expert_schedule(c.p, c.chosen->count);
    float* const contract = dense ? a.dense_act : a.expert_act;
    Bf16* const to = dense ? c.p.activations.dense_act : c.p.activations.expert_act;
    consume<kWholePieces>(c, schedule, kWarps, {in, stride}, [&](int, int units, float* room) {
      each_output<kUnitColumns>(c, units, [&](int u, int t, int column) {
        int unit = unit_in(room, u), row = t, width = d.inter;
        if (!dense) {
          const int i = c.p.by_expert_units.of(unit), slot = c.chosen->slot(i, t);
          if (slot < 0) return;
          unit -= i * rows.expert_units(), row = t * d.top_k + slot, width = d.moe_inter;
        }
        const int64_t at = int64_t{row} * width + unit * kUnitColumns + column;
        c.leave(contract, to, at, gated(room, u, t, column));
      });
    });
    // What down can multiply while the last experts are under way elsewhere.
    if (!dense) continue;
    c.early.arrive(), c.early.expect(static_cast<int>(gridDim.x));
    empty_projections(c, layer);
  }
  c.grid.arrive();
  c.grid.expect(gridDim.x);
}

}  // namespace TP_RESIDENT
