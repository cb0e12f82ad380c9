// Down projections of the dense MLP and of the chosen experts, whose weighted sum is taken leaf by leaf in
// the order of their ids.
#pragma once

#include "ops/cuda/resident/route.cuh"

namespace tp::cuda::resident {

/// Rows of an expert that a warp takes at once, so that (row, leaf) are its 32 lanes; places for leaves.
inline __host__ __device__ int expert_rows_of(int leaves) { return leaves > 4 ? 4 : kUnitRows; }
inline __host__ __device__ int leaf_lanes_of(int leaves) { return leaves > 4 ? 8 : 4; }

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
  __device__ Schedule dense_schedule(const Parameters& p) const { return {p, hidden / kUnitRows, 1}; }
  /// A portion is 8 experts' rows. Begins where the dense units ended.
  __device__ Schedule expert_schedule(const Parameters& p, int count) const {
    return {p, leaves > 4 ? hidden / 4 : hidden / kUnitRows, (count + kWarps - 1) / kWarps,
            hidden / kUnitRows};
  }
  __device__ const Bf16* dense_row(int unit, int r) const {
    return dense + (int64_t{unit} * kUnitRows + r) * inter;
  }
  __device__ const Bf16* expert_row(int expert, int unit) const {
    return experts + (int64_t{expert} * hidden + unit * expert_rows) * moe;
  }
};

/// Sums of an expert's rows, leaf by leaf, for the tokens that chose it, to `to`: (token, kExpertSums).
__device__ __forceinline__ void multiply_expert(const Context& c, const DownRows& rows, uint64_t slots,
                                                uint32_t weights, const Acts& acts, float* to) {
  const int lanes = leaf_lanes_of(rows.leaves);
  const int slot = static_cast<signed char>(slots >> (8 * c.column));  // absent tokens chose nothing
  uint32_t act = ptx::shared_address(acts.data) + (c.column * c.p.dims.top_k + slot) * acts.stride;
  weights += (c.column & (rows.expert_rows - 1)) * rows.moe * 2;
  act += c.quarter * 16, weights += c.quarter * 16;
  to += 2 * c.quarter * kExpertSums + c.column * lanes;
#pragma unroll 1
  for (int l = 0; l < lanes; l += 2) {
    Product products[2];
    const int second = l + 1 < rows.leaves ? kLeafPieces * 16 : 0;
    if (l < rows.leaves)
      multiply<kLeafPieces, false>(products, {weights, weights + second}, {act, act + second}, slot >= 0,
                                   c.quarter);
    act += 2 * kLeafPieces * 16, weights += 2 * kLeafPieces * 16;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = 2 * c.quarter + i;
      if (token >= c.tokens || c.column >= rows.expert_rows) continue;
      const bool chose = static_cast<signed char>(slots >> (8 * token)) >= 0;
#pragma unroll
      for (int k = 0; k < 2; k++)
        to[i * kExpertSums + l + k] = chose && l + k < rows.leaves ? products[k].sum(i) : 0;
    }
  }
}

/// The portions of a schedule of experts: a warp an expert, several units at once where tokens are few.
/// done(unit, token, row, value, there) by whole warps, a lane a row.
template <class Done>
__device__ __forceinline__ void consume_experts(Context& c, const Schedule& schedule, const DownRows& rows,
                                                const Acts& acts, Done&& done) {
  const int lanes = leaf_lanes_of(rows.leaves);
  const int count = c.chosen->count, row_bytes = rows.expert_rows * rows.moe * 2;
  const int at_once = schedule.parts > 1 ? 1 : c.p.by_tokens.of(kMostTokens);
  // As one of the 256 sums (portion, token; row, leaf):
  const int mine = c.p.by_tokens.of(c.warp), token = c.warp - mine * c.tokens;
  float sum = 0;
#pragma unroll 1
  for (int base = 0, unit = 0, part = 0; base < schedule.portions; base += at_once) {
    const int portions = min(at_once, schedule.portions - base), first = part * kWarps;
    float* const room = c.next_room();  // (portion, 8 experts, token, kExpertSums): row, leaf
#pragma unroll 1
    for (int n = 0; n < portions; n++) {
      c.ring.wait_full(false, c.peers);
      if (first + c.warp < count)
        multiply_expert(c, rows, c.chosen->slots[first + c.warp], c.ring.row(0, c.warp, row_bytes), acts,
                        room + (n * kWarps + c.warp) * c.tokens * kExpertSums);
      c.ring.release(1);
    }
    sync_consumers();
    const bool last = ++part == schedule.parts;
    if (mine < portions) {
      const float* const from = room + (mine * kWarps * c.tokens + token) * kExpertSums + c.lane;
#pragma unroll
      for (int k = 0; k < kWarps; k++)
        if (first + k < count)
          sum = fused(c.chosen->weight[first + k][token], from[k * c.tokens * kExpertSums], sum);
      if (last) {
        for (int span = 1; span < lanes; span *= 2) sum += __shfl_xor_sync(~0u, sum, span);
        sum = __shfl_sync(~0u, sum, c.lane * lanes);
        done(schedule.unit(unit + mine), token, c.lane, sum, c.lane < rows.expert_rows);
        sum = 0;
      }
    }
    if (last) part = 0, unit += portions;
  }
}

__device__ __forceinline__ void down(Context& c, const LayerArgs& layer) {
  const DownArgs& a = layer.down;
  const Dims& d = c.p.dims;
  const DownRows rows(a, d);
  const int dense_stride = stride_of(2 * d.inter), expert_stride = stride_of(2 * d.moe_inter);
  char* const expert_acts = c.acts + c.tokens * dense_stride;
  if (c.first) choose(c, layer.route, false, false);
  c.grid.wait(c.peers);
  c.mark(1);
  if (c.first) {
    load_acts(c.acts, dense_stride, a.dense_act, c.tokens, d.inter);
    load_acts(expert_acts, expert_stride, a.expert_act, c.tokens * d.top_k, d.moe_inter);
  } else {
    const Activations& from = c.p.activations;
    fetch_acts(c.acts, dense_stride, from.dense_act, c.tokens, d.inter);
    fetch_acts(expert_acts, expert_stride, from.expert_act, c.tokens * d.top_k, d.moe_inter);
    ptx::cp_async_wait_all();
  }
  sync_consumers();
  if (!c.last) c.next_sum();
  const auto put = [&](int which, int row, int t, float x, bool there) {
    const int64_t at = (int64_t{t} * 2 + which) * d.hidden + row;
    if (!c.last)
      push(c.peers, c.sum_turn, at, x, there);
    else if (there)
      a.sum[at] = x;
  };
  const Schedule dense = rows.dense_schedule(c.p), experts = rows.expert_schedule(c.p, c.chosen->count);
  consume<kDensePieces>(c, dense, d.leaves, {c.acts, dense_stride},
                        [&](int first, int units, const float* room) {
                          each_output<kUnitRows, true>(c, units, [&](int u, int t, int row) {
                            put(0, dense.unit(first + u) * kUnitRows + row, t,
                                joined_leaves(room, 1, d.leaves, 1, u, t, row), t < c.tokens);
                          });
                        });
  consume_experts(c, experts, rows, {expert_acts, expert_stride},
                  [&](int unit, int t, int row, float x, bool there) {
                    put(1, unit * rows.expert_rows + row, t, x, there);
                  });
  if (c.first) return;
  // While sums are on their way. All blocks have read the scores, the sums of attention and of the layer
  // before.
  const int of_attention = c.last ? c.sum_turn : c.turn_before();
  empty_scores(c);
  empty(c.peers, of_attention, c.tokens * d.hidden);
  empty(c.peers, turn_before(of_attention), 2 * c.tokens * d.hidden);
}

}  // namespace tp::cuda::resident
