// Down projections of the dense MLP and of the chosen experts, whose weighted sum is taken leaf by leaf in
// the order of their ids.
#pragma once

#include "ops/cuda/resident/route.cuh"

namespace tp::cuda::resident {

/// Rows of an expert that a warp takes at once, so that (row, leaf) are its 32 lanes.
inline __host__ __device__ int expert_rows_of(int leaves) { return leaves > 4 ? 4 : kUnitRows; }

struct DownRows {
  const Bf16 *dense, *experts;
  int hidden, inter, moe, leaves, expert_rows;
  __device__ DownRows(const DownArgs& a, const Dims& d)
      : dense(a.down),
        experts(a.expert_down),
        hidden(d.hidden),
        inter(d.inter),
        moe(d.moe_inter),
        leaves(d.leaves),
        expert_rows(expert_rows_of(d.leaves)) {}
  __device__ Schedule dense_schedule() const { return {hidden / kUnitRows, 1, 0}; }
  /// A portion is 8 experts' rows. Begins where the dense units ended.
  __device__ Schedule expert_schedule(int count) const {
    return {hidden / expert_rows, (count + kWarps - 1) / kWarps, hidden / kUnitRows};
  }
  __device__ const Bf16* dense_row(int unit, int r) const {
    return dense + (int64_t{unit} * kUnitRows + r) * inter;
  }
  __device__ const Bf16* expert_row(int expert, int unit) const {
    return experts + (int64_t{expert} * hidden + unit * expert_rows) * moe;
  }
};

/// The portions of a schedule of experts. done(unit, token, row, value) by one thread an output.
template <class Done>
__device__ __forceinline__ void consume_experts(Context& c, const Schedule& schedule, const DownRows& rows,
                                                const Acts& acts, Done&& done) {
  const int lanes = 32 / rows.expert_rows;  // places for leaves: 4 or 8
  const int top_k = c.p.dims.top_k, count = c.chosen->count, row_bytes = rows.expert_rows * rows.moe * 2;
  // As one of the 256 sums (token, row, leaf):
  const int token = c.warp, row = c.lane / lanes, leaf = c.lane % lanes;
  const uint64_t mine = c.chosen->of(token);
#pragma unroll 1
  for (int unit = 0; unit < schedule.units; unit++) {
    float sum = 0;
#pragma unroll 1
    for (int part = 0; part < schedule.parts; part++) {
      float* const room = c.next_room();  // (8 experts, token, kExpertSums): row, leaf
      const int i = part * kWarps + c.warp;
      const uint32_t taken = c.ring.wait_full(c.warp, row_bytes, c.peers);
      if (i < count) {
        const int slot = c.column < c.tokens ? c.chosen->slot(i, c.column) : -1;
        uint32_t act = ptx::shared_address(acts.data) + (c.column * top_k + slot) * acts.stride;
        uint32_t weights = taken + c.column % rows.expert_rows * rows.moe * 2;
        act += c.quarter * 16, weights += c.quarter * 16;
        float* const to = room + (c.warp * kMostTokens + c.column) * kExpertSums + 2 * c.quarter * lanes;
        const bool stores = c.column < c.tokens && 2 * c.quarter < rows.expert_rows;
#pragma unroll 2
        for (int l = 0; l < lanes; l++, weights += kLeafPieces * 16) {
          float sums[2] = {0, 0};
          if (l < rows.leaves) {
            product<kLeafPieces>(weights, act, slot >= 0, c.quarter, sums);
            act += kLeafPieces * 16;
          }
          if (stores) to[l] = sums[0], to[lanes + l] = sums[1];
        }
      }
      c.ring.release();
      sync_consumers();
#pragma unroll 1
      for (unsigned own = mine >> (part * kWarps) & 0xff; own != 0; own &= own - 1) {
        const int k = __ffs(static_cast<int>(own)) - 1;
        sum = fused(c.chosen->weight[part * kWarps + k][token],
                    room[(k * kMostTokens + token) * kExpertSums + c.lane], sum);
      }
    }
    if (token >= c.tokens) continue;
    for (int span = 1; span < lanes; span *= 2) sum += __shfl_xor_sync(~0u, sum, span);
    if (leaf == 0) done(schedule.unit(unit), token, row, sum);
  }
}

__device__ __forceinline__ void down(Context& c, const LayerArgs& layer) {
  const DownArgs& a = layer.down;
  const Dims& d = c.p.dims;
  const DownRows rows(a, d);
  const int dense_stride = stride_of(2 * d.inter), expert_stride = stride_of(2 * d.moe_inter);
  char* const expert_acts = c.acts + c.tokens * dense_stride;
  if (c.first) choose(c, layer.route, false);
  c.grid.wait(c.peers);
  c.mark(1);
  if (c.first) {
    load_acts(c.acts, dense_stride, a.dense_act, c.tokens, d.inter);
    load_acts(expert_acts, expert_stride, a.expert_act, c.tokens * d.top_k, d.moe_inter);
  } else {
    const Activations& from = c.p.activations;
    fetch_acts(c, c.acts, dense_stride, from.dense_act, c.tokens, d.inter);
    fetch_acts(c, expert_acts, expert_stride, from.expert_act, c.tokens * d.top_k, d.moe_inter);
    ptx::cp_async_wait_all();
  }
  sync_consumers();
  if (!c.last) c.epoch++;
  const auto put = [&](int which, int row, int t, float x) {
    const int64_t at = (int64_t{t} * 2 + which) * d.hidden + row;
    if (c.last)
      a.sum[at] = x;
    else
      push(c.peers, c.epoch, at, x);
  };
  const Schedule dense = rows.dense_schedule(), experts = rows.expert_schedule(c.chosen->count);
  consume<kDensePieces>(
      c, dense, d.leaves, {c.acts, dense_stride}, [&](int first, int units, const float* room) {
        each_output<kUnitRows>(c, units, [&](int u, int t, int row) {
          put(0, dense.unit(first + u) * kUnitRows + row, t, joined_leaves(room, 1, d.leaves, 1, u, t, row));
        });
      });
  consume_experts(c, experts, rows, {expert_acts, expert_stride},
                  [&](int unit, int t, int row, float x) { put(1, unit * rows.expert_rows + row, t, x); });
}

}  // namespace tp::cuda::resident
