// Down projections of the dense MLP and of the chosen experts, whose weighted sum is taken leaf by leaf in
// the order of their ids.
#pragma once

#include "ops/cuda/resident/route.cuh"

namespace TP_RESIDENT {

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

/// The tokens that chose an expert, as columns of its products: each its own column, or, of more than 8
/// tokens, the next 8 that chose it.
class Choosers {
 public:
  __device__ Choosers(const Chosen& chosen, int i) {
#pragma unroll
    for (int g = 0; g < kTokenGroups; g++) {
      slots_[g] = chosen.slots[g][i];
      // A bit a token.
      const uint64_t there = ~slots_[g] >> 7 & 0x0101010101010101ull;
      if (!kFewTokens) left_ |= static_cast<uint32_t>(there * 0x0102040810204080ull >> 56) << g * kColumns;
    }
  }
  /// The column's row of the experts' activations (T, K); negative: none.
  __device__ __forceinline__ int row(int column, int top_k) const {
    int token = column;
    if (!kFewTokens) {
      uint32_t left = left_;
#pragma unroll
      for (int i = 1; i < kColumns; i++) left &= i <= column ? left - 1 : ~0u;
      token = __ffs(static_cast<int>(left)) - 1;
    }
    const uint64_t slots = token < kColumns ? slots_[0] : slots_[kTokenGroups - 1];
    const int slot = static_cast<signed char>(slots >> 8 * (token & (kColumns - 1)));
    return token < 0 || slot < 0 ? -1 : token * top_k + slot;
  }
  /// Whether there are more of them than columns, of which row() tells then.
  __device__ __forceinline__ bool next() {
#pragma unroll
    for (int i = 0; i < kColumns; i++) left_ &= left_ - 1;
    return !kFewTokens && __any_sync(~0u, left_ != 0);
  }

 private:
  uint64_t slots_[kTokenGroups];
  uint32_t left_ = 0;
};

/// Takes a portion, of which the warp has an expert's rows or half of them: their sums, leaf by leaf, up to
/// four of them, for the tokens that chose it, to `to`: (token, K, row, leaf), kExpertSums a token's expert.
/// Leaves that are not there are nothing, which takes less time than to branch.
__device__ __forceinline__ void multiply_expert(Context& c, const DownRows& rows, int i, int half,
                                                const Acts& acts, float* to) {
  constexpr int kLeaf = kLeafPieces * 16;  // bytes
  const uint32_t offset = half * 4 * kLeaf + c.quarter * 16;
  Choosers choosers(*c.chosen, i);
  int row;
  Operand<kLeafPieces> w[4], x[4];
  const auto load = [&] {
    row = choosers.row(c.column, c.p.dims.top_k);
    const char* const from = acts.data + row * acts.stride + offset;
#pragma unroll
    for (int l = 0; l < 4; l++) {
      const bool there = l < rows.leaves && row >= 0;
      if (kFewTokens)
        x[l].load(ptx::shared_address(from) + l * kLeaf, c.quarter, there);
      else
        x[l].load(reinterpret_cast<const Bf16*>(from + l * kLeaf), c.quarter, there);
    }
  };
  if (!kFewTokens) load();  // on its way before the weights are there
  c.ring.wait_full(c.peers);
  const int in_portion = halves_of(rows.leaves) > 1 ? c.warp / 2 * 2 : c.warp;
  const uint32_t weights = c.ring.row(in_portion, rows.ring_row_bytes()) + c.column * rows.moe * 2 + offset;
#pragma unroll
  for (int l = 0; l < 4; l++) w[l].load(weights + l * kLeaf, c.quarter, l < rows.leaves);
  if (kFewTokens) load();
  __syncwarp();  // all loads are on their way before the first is waited for
  c.ring.release();
  do {
    Product products[4];
#pragma unroll
    for (int i = 0; i < Operand<kLeafPieces>::kSteps; i++)
#pragma unroll
      for (int l = 0; l < 4; l++) products[l].add(w[l].x[i], x[l].x[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int to_row = __shfl_sync(~0u, row, (2 * c.quarter + i) * 4);
      if (to_row >= 0)
        *reinterpret_cast<float4*>(to + to_row * kExpertSums + c.column * 4) =
            make_float4(products[0].sum(i), products[1].sum(i), products[2].sum(i), products[3].sum(i));
    }
    if (!choosers.next()) break;
    load();
  } while (true);
}

/// The portions of a schedule of experts: a warp an expert, or half of one. Between two meetings as many
/// units as there is room for: of a unit every token has K sums. done(unit, token, row, value, there) by
/// whole warps, a lane a row.
template <int Halves, class Done>
__device__ __forceinline__ void consume_experts(Context& c, const Schedule& schedule, const DownRows& rows,
                                                const Acts& acts, Done&& done) {
  constexpr int kOnce = kWarps / Halves;  // experts
  const int count = c.chosen->count, top_k = c.p.dims.top_k;
  const int own = c.warp / Halves, half = c.warp % Halves;
  const int units_once = c.p.by_tokens.of(kMostTokens), unit_floats = c.tokens * top_k * kExpertSums;
  const int half_floats = kFewTokens ? kRoomFloats : units_once * unit_floats;
  int turn = 0;
#pragma unroll 1
  for (int unit = 0; unit < schedule.units; unit += units_once) {
    const int units = min(units_once, schedule.units - unit), portions = units * schedule.parts;
    // (half, unit, token, K, kExpertSums): of two halves both rooms, which all must have read.
    constexpr bool kBothRooms = kFewTokens && Halves > 1;
    if (kBothRooms) sync_consumers();
    float* const room = !kFewTokens  ? reinterpret_cast<float*>(c.acts) + turn * Halves * half_floats
                        : kBothRooms ? c.exchange
                                     : c.next_room();
    turn ^= 1;
    float* to = room + half * half_floats;
#pragma unroll 1
    for (int n = 0, part = 0; n < portions; n++) {
      const int i = part * kOnce + own;
      if (__any_sync(~0u, i < count)) {
        multiply_expert(c, rows, i, half, acts, to);
      } else {
        c.ring.wait_full(c.peers);
        c.ring.release();
      }
      if (++part == schedule.parts) part = 0, to += unit_floats;
    }
    sync_consumers();
    // A warp has one of the unit's tokens at a time: a lane's sum is of a row and a leaf.
#pragma unroll 1
    for (int task = c.warp; __any_sync(~0u, task < units * c.tokens); task += kWarps) {
      const int mine = c.p.by_tokens.of(task), token = task - mine * c.tokens;
      const float* const from = room + mine * unit_floats + token * top_k * kExpertSums + c.lane;
      float sums[Halves] = {};  // of four leaves each
#pragma unroll
      for (int k = 0; k < kMostTopK; k++) {
        if (k >= top_k) continue;
        const float weight = c.chosen->weight[token][k];
        const float* const sum = from + c.chosen->of_token[token][k] * kExpertSums;
#pragma unroll
        for (int h = 0; h < Halves; h++) sums[h] = fused(weight, sum[h * half_floats], sums[h]);
      }
#pragma unroll
      for (int span = 1; span < 4; span *= 2)
#pragma unroll
        for (float& x : sums) x += __shfl_xor_sync(~0u, x, span);
      const float sum = __shfl_sync(~0u, Halves > 1 ? sums[0] + sums[Halves - 1] : sums[0], c.lane * 4);
      done(schedule.unit(unit + mine), token, c.lane, sum, c.lane < kUnitRows);
    }
  }
  if (!kFewTokens) sync_consumers();  // what follows is laid where sums may still be read
}

__device__ __forceinline__ void down(Context& c, const LayerArgs& layer) {
  const DownArgs& a = layer.down;
  const Dims& d = c.p.dims;
  const DownRows rows(a, d);
  // The experts' activations come where the dense MLP's have been, or, of many tokens, not at all. Few tokens
  // choose the same expert: rows of its activations may begin in the same banks.
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
  char* const of_experts = kFewTokens ? c.acts : reinterpret_cast<char*>(from.expert_act);
  const int expert_rows = c.tokens * d.top_k;
  if (c.first) {  // to memory every block brings the same
    load_acts(of_experts, expert_stride, a.expert_act, expert_rows, d.moe_inter, d.moe_inter);
  } else {  // what other blocks still had to do is done behind the dense products
    c.grid.wait(c.peers);
    c.mark(1);
    if (kFewTokens) {
      fetch_acts(c.acts, expert_stride, from.expert_act, expert_rows, d.moe_inter, d.moe_inter);
      ptx::cp_async_wait_all();
    }
  }
  sync_consumers();
  const auto put_experts = [&](int unit, int t, int row, float x, bool there) {
    put(1, unit * kUnitRows + row, t, x, there);
  };
  const Acts acts{of_experts, expert_stride};
  if (rows.halves > 1)
    consume_experts<2>(c, experts, rows, acts, put_experts);
  else
    consume_experts<1>(c, experts, rows, acts, put_experts);
  if (c.first) return;
  // While sums are on their way. All blocks have read the scores, the sums of attention and of the layer
  // before.
  const int of_attention = c.last ? c.sum_turn : turn_before(c.sum_turn);
  empty_scores(c);
  empty(c.peers, of_attention, c.tokens * d.hidden);
  empty(c.peers, turn_before(of_attention), 2 * c.tokens * d.hidden);
}

}  // namespace TP_RESIDENT
