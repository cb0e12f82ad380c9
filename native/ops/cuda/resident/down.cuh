// Down projections of the dense MLP and of the chosen experts, whose weighted sum is taken leaf by leaf in
// the order of their ids.
#pragma once

#include "ops/cuda/resident/route.cuh"

namespace tp::cuda::resident {

/// Four leaves of an expert's 8 rows are a warp's 32 sums; of eight leaves a second warp takes the others.
inline __host__ __device__ int halves_of(int leaves) { return leaves > 4 ? 2 : 1; }

struct DownRows {
  const Bf16 *dense, *experts;
  int hidden, inter, moe, leaves, halves;
  __device__ DownRows(const DownArgs& a, const Dims& d)
      : dense(a.down),
        experts(a.expert_down),
        hidden(d.hidden),
        inter(d.inter),
        moe(d.moe_inter),
        leaves(d.leaves),
        halves(halves_of(d.leaves)) {}
  /// Of the experts' units the blocks behind the first `more` have one less, so they get what is left of the
  /// dense MLP's when each has its share.
  __device__ Schedule dense_schedule(const Parameters& p) const {
    const int all = hidden / kUnitRows, blocks = static_cast<int>(gridDim.x), each = p.by_blocks.of(all);
    const int more = all - each * blocks, others = blocks - more, block = static_cast<int>(blockIdx.x);
    if (block < more) return {block, more, each};
    const int first = each * more + block - more;
    return {first, others, (all - first + others - 1) / others};
  }
  /// Experts of a portion: as many as 8 warps take.
  __device__ int at_once() const { return kWarps >> (halves - 1); }
  __device__ Schedule expert_schedule(const Parameters& p, int count) const {
    return {p, hidden / kUnitRows, (count + at_once() - 1) >> (halves > 1 ? 2 : 3)};
  }
  __device__ const Bf16* dense_row(int unit, int r) const {
    return dense + (int64_t{unit} * kUnitRows + r) * inter;
  }
  __device__ const Bf16* expert_rows(int expert, int unit) const {
    return experts + (int64_t{expert} * hidden + unit * kUnitRows) * moe;
  }
  /// Bytes that one of the 8 rows of a portion in the ring has: of an expert's 8, or of its first or last 4.
  __device__ int ring_row_bytes() const { return 2 * moe * kUnitRows >> (halves - 1); }
};

/// Sums of an expert's rows, leaf by leaf, up to four of them, for the tokens that chose it, to `to`: (token,
/// K, row, leaf), kExpertSums a token's expert. Leaves that are not there are nothing, which takes less time
/// than to branch.
__device__ __forceinline__ void multiply_expert(const Context& c, const DownRows& rows, uint64_t slots,
                                                uint32_t weights, int half, const Acts& acts, float* to) {
  constexpr int kLeaf = kLeafPieces * 16;                              // bytes
  const int slot = static_cast<signed char>(slots >> (8 * c.column));  // absent tokens chose nothing
  const uint32_t offset = half * 4 * kLeaf + c.quarter * 16;
  const uint32_t act =
      ptx::shared_address(acts.data) + (c.column * c.p.dims.top_k + slot) * acts.stride + offset;
  weights += c.column * rows.moe * 2 + offset;
  Operand<kLeafPieces> w[4], x[4];
#pragma unroll
  for (int l = 0; l < 4; l++) {
    const bool there = l < rows.leaves;
    w[l].load(weights + l * kLeaf, c.quarter, there),
        x[l].load(act + l * kLeaf, c.quarter, there && slot >= 0);
  }
  __syncwarp();  // all loads are on their way before the first is waited for
  Product products[4];
#pragma unroll
  for (int i = 0; i < Operand<kLeafPieces>::kSteps; i++)
#pragma unroll
    for (int l = 0; l < 4; l++) products[l].add(w[l].x[i], x[l].x[i]);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = 2 * c.quarter + i, of_token = static_cast<signed char>(slots >> (8 * token));
    if (of_token >= 0)
      *reinterpret_cast<float4*>(to + (token * c.p.dims.top_k + of_token) * kExpertSums + c.column * 4) =
          make_float4(products[0].sum(i), products[1].sum(i), products[2].sum(i), products[3].sum(i));
  }
}

/// The portions of a schedule of experts: a warp an expert, or half of one. Between two meetings as many
/// units as there is room for: of a unit every token has K sums. done(unit, token, row, value, there) by
/// whole warps, a lane a row.
template <int Halves, class Done>
__device__ __forceinline__ void consume_experts(Context& c, const Schedule& schedule, const DownRows& rows,
                                                const Acts& acts, Done&& done) {
  constexpr int kOnce = kWarps / Halves;  // experts
  const int count = c.chosen->count, row_bytes = rows.ring_row_bytes(), top_k = c.p.dims.top_k;
  const int own = c.warp / Halves, half = c.warp % Halves;
  const int units_once = c.p.by_tokens.of(kMostTokens), unit_floats = c.tokens * top_k * kExpertSums;
  // As one of the 256 sums (unit, token; row, leaf):
  const int mine = c.p.by_tokens.of(c.warp), token = c.warp - mine * c.tokens;
#pragma unroll 1
  for (int unit = 0; unit < schedule.units; unit += units_once) {
    const int units = min(units_once, schedule.units - unit), portions = units * schedule.parts;
    // (half, unit, token, K, kExpertSums): of two halves both rooms, which all must have read.
    if (Halves > 1) sync_consumers();
    float* const room = Halves > 1 ? c.exchange : c.next_room();
    float* to = room + half * kRoomFloats;
#pragma unroll 1
    for (int n = 0, part = 0; n < portions; n++) {
      c.ring.wait_full(c.peers);
      const int i = part * kOnce + own;
      if (__any_sync(~0u, i < count))
        multiply_expert(c, rows, c.chosen->slots[i], c.ring.row(own * Halves, row_bytes), half, acts, to);
      c.ring.release();
      if (++part == schedule.parts) part = 0, to += unit_floats;
    }
    sync_consumers();
    if (!__any_sync(~0u, mine < units)) continue;
    const float* const from = room + mine * unit_floats + token * top_k * kExpertSums + c.lane;
    float sums[Halves] = {};  // of four leaves each
#pragma unroll
    for (int k = 0; k < kMostTopK; k++) {
      if (k >= top_k) continue;
      const float weight = c.chosen->weight[token][k];
      const float* const sum = from + c.chosen->of_token[token][k] * kExpertSums;
#pragma unroll
      for (int h = 0; h < Halves; h++) sums[h] = fused(weight, sum[h * kRoomFloats], sums[h]);
    }
#pragma unroll
    for (int span = 1; span < 4; span *= 2)
#pragma unroll
      for (float& x : sums) x += __shfl_xor_sync(~0u, x, span);
    const float sum = __shfl_sync(~0u, Halves > 1 ? sums[0] + sums[Halves - 1] : sums[0], c.lane * 4);
    done(schedule.unit(unit + mine), token, c.lane, sum, c.lane < kUnitRows);
  }
}

__device__ __forceinline__ void down(Context& c, const LayerArgs& layer) {
  const DownArgs& a = layer.down;
  const Dims& d = c.p.dims;
  const DownRows rows(a, d);
  // The experts' activations come where the dense MLP's have been. Few tokens choose the same expert: rows of
  // its activations may begin in the same banks.
  const int dense_stride = stride_of(2 * d.inter), expert_stride = 2 * d.moe_inter;
  const Activations& from = c.p.activations;
  if (c.first) {
    choose(c, layer.route, false, false);
    load_acts(c.acts, dense_stride, a.dense_act, c.tokens, d.inter, d.inter);
  } else {
    c.early.wait(c.peers);
    fetch_acts(c.acts, dense_stride, from.dense_act, c.tokens, d.inter, d.inter);
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
  consume<kDensePieces>(c, dense, d.leaves, {c.acts, dense_stride}, [&](int, int units, float* room) {
    each_output<kUnitRows, true>(c, units, [&](int u, int t, int row) {
      put(0, unit_in(room, u) * kUnitRows + row, t, joined(room, u, t, row, d.leaves), t < c.tokens);
    });
  });
  if (c.first) {
    load_acts(c.acts, expert_stride, a.expert_act, c.tokens * d.top_k, d.moe_inter, d.moe_inter);
  } else {  // what other blocks still had to do is done behind the dense products
    c.grid.wait(c.peers);
    c.mark(1);
    fetch_acts(c.acts, expert_stride, from.expert_act, c.tokens * d.top_k, d.moe_inter, d.moe_inter);
    ptx::cp_async_wait_all();
  }
  sync_consumers();
  const auto put_experts = [&](int unit, int t, int row, float x, bool there) {
    put(1, unit * kUnitRows + row, t, x, there);
  };
  const Acts of_experts{c.acts, expert_stride};
  if (rows.halves > 1)
    consume_experts<2>(c, experts, rows, of_experts, put_experts);
  else
    consume_experts<1>(c, experts, rows, of_experts, put_experts);
  if (c.first) return;
  // While sums are on their way. All blocks have read the scores, the sums of attention and of the layer
  // before.
  const int of_attention = c.last ? c.sum_turn : turn_before(c.sum_turn);
  empty_scores(c);
  empty(c.peers, of_attention, c.tokens * d.hidden);
  empty(c.peers, turn_before(of_attention), 2 * c.tokens * d.hidden);
}

}  // namespace tp::cuda::resident
