// The resident kernel: a block a multiprocessor runs the stages of the plan one after the other. Eight warps
// compute; the ninth walks the same plan and keeps the ring full of what they will need, so that memory is
// read while blocks wait for each other, for a peer or for the router.
#pragma once

#include <algorithm>

#include "ops/cuda/resident/attention.cuh"
#include "ops/cuda/resident/attn_out.cuh"
#include "ops/cuda/resident/down.cuh"
#include "ops/cuda/resident/ffn_out.cuh"
#include "ops/cuda/resident/gate_up.cuh"
#include "ops/cuda/resident/logits.cuh"
#include "ops/cuda/resident/qkv.cuh"

namespace TP_RESIDENT {

/// Keys and values of the block's tiles of attention: a slot each. The caches are rings too, so a tile may be
/// two pieces.
__device__ __forceinline__ void fill_tiles(const Tasks& tasks, const AttentionArgs& a, RingFiller& ring,
                                           const PeerMemory& peers, uint64_t policy) {
  const int tile = tile_of(a.heads.head_dim), row_bytes = 2 * a.heads.head_dim, lane = threadIdx.x % 32;
  const bool second = lane % kSlotRows == 1;
  const auto* const cache = static_cast<const Bf16*>(lane < kSlotRows ? a.cache.k : a.cache.v);
#pragma unroll 1
  for (int i = tasks.end - 1; i >= tasks.begin; i--) {
#pragma unroll 1
    for (AttentionTask task = tasks.at(i, tile); task.begin < task.end; tasks.next_tile(task, tile)) {
      const int rows = min(task.end - task.begin, tile), of_first = min(rows, task.edge);
      const int begin = second ? of_first : 0, bytes = ((second ? rows : of_first) - begin) * row_bytes;
      const bool here = bytes > 0 && lane % kSlotRows < 2;
      ring.produce(here ? cache + tasks.row_of(task, begin) * a.heads.head_dim : nullptr, bytes,
                   begin * row_bytes, kBytesAhead, peers, policy);
    }
  }
}

/// What the ninth warp does: portions in the order in which the stages take them. Lane r brings row r.
__device__ void fill_ring(const Parameters& p, RingFiller ring, const Chosen& chosen, uint32_t listed,
                          const Tasks* tasks) {
  const Dims& d = p.dims;
  // Weights are read once a step: let them not drive out what is read again.
  const uint64_t policy = ptx::evict_first_policy();
  const int r = threadIdx.x % kUnitRows;
  uint32_t lists = 0, tickets = 0;
  bool prepared = false;
  const auto wait_list = [&] { wait_phase(listed, lists++ & 1, p.peers); };
  // A stage has two matrices or turns of one. All go through one loop, which keeps its code in the
  // instruction cache.
#pragma unroll 1
  for (int at = kMostTurns * p.from; at < kMostTurns * p.to; at++) {
    const int step = at / kMostTurns, turn = at % kMostTurns;
    const LayerArgs& layer = p.layers[min(step / kStages, p.layer_count - 1)];
    const int stage = step == p.layer_count * kStages ? kStages : step % kStages;
    const QkvRows qkv(layer.qkv);
    const GateUpRows gate_up(layer.gate_up, d);
    const DownRows down(layer.down, d);
    Schedule schedule(p, 0, 1);
    const Bf16* rows = nullptr;            // of unit 0, where units follow one another
    int unit_stride = 0, part_stride = 0;  // elements
    int row_bytes = 2 * d.hidden;
    bool adjacent = true;
    const int matrix = 2 * stage + min(turn, 1);
    if (turn > 1 && stage != kAttnOut) continue;
    switch (matrix) {
      case 2 * kQkv:
        schedule = qkv.schedule(p);
        break;
      case 2 * kAttention:
        if (!prepared) sync_prepared(), prepared = true;
        fill_tiles(tasks[layer.attention.heads.window == 0], layer.attention, ring, p.peers, policy);
        continue;
      case 2 * kAttnOut:
      case 2 * kAttnOut + 1: {
        const AttnOutRows of(layer.attn_out, p);
        if (turn >= of.turns) continue;
        schedule = of.schedule(p);
        rows = of.row(0, turn, r), unit_stride = kUnitRows * of.columns, part_stride = of.part();
        row_bytes = 2 * of.part(), adjacent = of.part() == of.columns;
        break;
      }
      case 2 * kGateUp:
        schedule = gate_up.dense_schedule(p);
        rows = gate_up.dense_row(0, r), unit_stride = kUnitColumns * d.hidden;
        break;
      case 2 * kGateUp + 1:
        wait_list();
        schedule = gate_up.expert_schedule(p, chosen.count);
        break;
      case 2 * kDown:
        if (step == p.from) wait_list();
        schedule = down.dense_schedule(p);
        rows = down.dense_row(0, r), unit_stride = kUnitRows * d.inter, row_bytes = 2 * d.inter;
        break;
      case 2 * kDown + 1:
        schedule = down.expert_schedule(p, chosen.count);
        row_bytes = down.ring_row_bytes(), adjacent = false;
        break;
      case 2 * kStages:
        schedule = logits_schedule(p);
        rows = p.logits.table + int64_t{r} * d.hidden, unit_stride = kUnitRows * d.hidden;
        break;
      default:
        continue;
    }
    // As much as fits into the ring before its stage begins.
    const bool early = matrix == 2 * kQkv || stage == kAttnOut || matrix == 2 * kGateUp;
    int gently = early ? p.slots / kUnitSlots : 0;  // portions
    Draw draw(p, schedule, tickets);
    int portions = schedule.portions();
#pragma unroll 1
    for (int n = 0, unit = schedule.first, part = 0; n < portions; n++, gently--) {
      int next = unit + schedule.step;
      draw.look_ahead(n, portions, next);
      const Bf16* from = rows + int64_t{unit} * unit_stride + part * part_stride;
      if (matrix == 2 * kQkv) {
        from = qkv.row(unit, r, d.hidden);
      } else if (matrix == 2 * kGateUp + 1) {
        const int i = p.by_expert_units.of(unit);
        from = gate_up.expert_row(chosen.expert[i], unit - i * gate_up.expert_units(), r);
      } else if (matrix == 2 * kDown + 1) {
        const int shift = down.halves - 1, i = part * down.at_once() + (r >> shift);
        from = i < chosen.count
                   ? down.expert_rows(chosen.expert[i], unit) + (r & shift) * (kUnitRows / 2) * d.moe_inter
                   : nullptr;
      }
      // Neighbours in memory come by one copy.
      const bool first = r % kSlotRows == 0;
      ring.announce(unit, n + 1 == portions);
      const int ahead = gently > 0 ? kOneSlot : gently > -kShortStage ? kBytesAhead : kBytesFarAhead;
      ring.produce(adjacent && !first ? nullptr : from, adjacent ? kSlotRows * row_bytes : row_bytes,
                   r % kSlotRows * row_bytes, ahead, p.peers, policy);
      if (++part == schedule.parts) part = 0, unit = next;
    }
  }
}

/// One stage of one layer, by the computing warps.
__device__ __forceinline__ void run_stage(Context& c, int stage, const LayerArgs& layer) {
  switch (stage) {
    case kQkv:
      return qkv(c, layer);
    case kAttention:
      return attention(c, layer);
    case kAttnOut:
      return attn_out(c, layer);
    case kRoute:
      return route(c, layer);
    case kGateUp:
      return gate_up(c, layer);
    case kDown:
      return down(c, layer);
    default:
      return ffn_out(c, layer);
  }
}

/// Brings a layer's arguments into shared memory behind the running stage.
__device__ inline void fetch(LayerArgs* to, const LayerArgs* from) {
  static_assert(sizeof(LayerArgs) % 8 == 0);
  for (int i = threadIdx.x * 8; i < static_cast<int>(sizeof(LayerArgs)); i += kThreads * 8)
    ptx::cp_async_8(ptx::shared_address(to) + i, reinterpret_cast<const char*>(from) + i);
}
__device__ inline void wait_fetched() {
  ptx::cp_async_wait_all();
  sync_consumers();
}

/// Between ring and activations.
constexpr int kResidualBytes = up(2 * kRowLength, 128);

__global__ void __launch_bounds__(kBlock, 1) run_stages(const __grid_constant__ Parameters p) {
  TP_DYNAMIC_SHARED(char, memory, 128);  // ring, residual, activations, exchange
  __shared__ uint64_t barriers[kRingWords], listed;
  __shared__ Chosen chosen;
  alignas(16) __shared__ float room[2 * kMostTokens * kWarps];
  __shared__ Tasks tasks[2];
  __shared__ LayerArgs layers[2];
  Ring ring(p, memory, barriers);
  const int tokens = p.in.tokens;
  if (threadIdx.x == 0) {
    ring.prepare();
    ptx::mbarrier_init<1>(ptx::shared_address(&listed));
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warp_index() >= kWarps) {
    ptx::keep_registers<kFillerRegisters>();
    if (warp_index() == kWarps) fill_ring(p, RingFiller(ring), chosen, ptx::shared_address(&listed), tasks);
    return;
  }

  ptx::take_registers<kRegisters>();

  const int lane = threadIdx.x % 32;
  char* const acts = memory + p.slots * p.slot_bytes + kResidualBytes;
  Context c{p,
            p.peers,
            tokens,
            warp_index(),
            lane,
            lane / 4,
            lane % 4,
            ring,
            ArrivalCounter(&p.counters->grid, __ldcg(&p.counters->grid_before)),
            ArrivalCounter(&p.counters->early, __ldcg(&p.counters->early_before)),
            Sums(room),
            acts - kResidualBytes,
            acts,
            reinterpret_cast<float*>(acts + p.act_bytes),
            &chosen,
            ptx::shared_address(&listed),
            tasks,
            __ldcg(&p.counters->sum_turn)};
  const int first_layer = p.from / kStages;
  if (first_layer < p.layer_count) fetch(&layers[first_layer & 1], p.layers + first_layer);
  if (c.warp < 2 && p.kinds[c.warp].heads.heads > 0) tasks[c.warp].prepare(p, p.kinds[c.warp], acts);
  say_prepared();
  // What the launch before has read.
  const int left = 2 * __ldcg(&p.counters->tokens_before) * p.dims.hidden;
  empty(c.peers, c.sum_turn, left), empty(c.peers, turn_before(c.sum_turn), left);
  if (c.alone() || c.owner()) {
    Row row;
    row.load(p.layers->qkv.hidden + int64_t{c.row()} * kRowLength, kRowLength);
    row.put(c.residual, kRowLength);
    const int begins = p.from % kStages;
    if (c.alone() && (begins == kRoute || begins == kFfnOut)) {  // block 0 would overwrite what others read
      c.grid.arrive(), c.grid.expect(gridDim.x);
      c.grid.wait(c.peers);
    }
  }
  if (p.marks) c.marks = p.marks + (int64_t{blockIdx.x} * (p.layer_count * kStages + 1) + p.from) * 4;
#pragma unroll 1
  for (int step = p.from; step < p.to; step++) {
    const int layer = step / kStages, stage = step % kStages;
    c.layer = layer, c.first = step == p.from, c.last = step + 1 == p.to;
    c.mark(0);
    if (layer == p.layer_count) {
      logits(c);
    } else {
      if (c.first || stage == 0) {
        wait_fetched();
        if (layer + 1 < p.layer_count) fetch(&layers[(layer + 1) & 1], p.layers + layer + 1);
      }
      run_stage(c, stage, layers[layer & 1]);
    }
    c.mark(3);
    if (c.marks) c.marks += 4;
  }

  wait_fetched();
  // Of a launch that ends within a layer: what the stages to come would have emptied.
  const int last = p.to - 1, ended = last % kStages;
  const bool projected = ended > kQkv && ended < kGateUp && last - ended >= p.from;
  const bool routed = ended == kGateUp && last > p.from;
  if (last < p.layer_count * kStages && (projected || routed)) {
    c.grid.arrive(), c.grid.expect(gridDim.x);
    c.grid.wait(c.peers);
    if (projected) empty_projections(c, layers[last / kStages & 1]);
    if (routed) empty_scores(c);
  }
  if (threadIdx.x > 0) return;
  __threadfence();
  if (atomicAdd(&p.counters->exited, 1u) != gridDim.x - 1) return;
  p.counters->exited = p.counters->tickets = 0;
  p.counters->grid_before = c.grid.due(), p.counters->early_before = c.early.due();
  p.counters->sum_turn = c.sum_turn, p.counters->tokens_before = p.in.tokens;
}

/// What products exchange; it lies behind the activations and is free while attention runs, which takes both.
constexpr int kExchangeBytes = 2 * kRoomFloats * static_cast<int>(sizeof(float));

int least_act_bytes(const Decoder& decoder, const Dims& d, int tokens, int blocks) {
  const auto floats = [](int n) { return n * static_cast<int>(sizeof(float)); };
  // Weights of four norms; later a token's inputs of router, dense MLP and experts, or rows of all.
  int most = std::max(std::max(4, tokens) * stride_of(2 * d.hidden), tokens * stride_of(2 * d.inter));
  const int of_experts = tokens * d.top_k;
  most = std::max(most, kFewTokens ? of_experts * 2 * d.moe_inter
                                   : floats(2 * halves_of(d.leaves) * of_experts * kExpertSums));
  const int units = (d.hidden / kUnitRows + blocks - 1) / blocks;
  for (const LayerArgs& layer : decoder.layers) {
    const int columns = layer.attn_out.columns, turns = std::clamp(columns / kAttentionPart, 1, kMostTurns);
    most = std::max(most, tokens * stride_of(2 * columns / turns) + floats(held_floats(turns, units)));
    const size_t room =
        layer.attention.heads.head_dim == 256 ? sizeof(AttentionRoom<256>) : sizeof(AttentionRoom<512>);
    most = std::max(most, static_cast<int>(room) - kExchangeBytes);
  }
  return most;
}

Kernel kernel() { return {run_stages, kMostTokens, kResidualBytes + kExchangeBytes, least_act_bytes}; }

}  // namespace TP_RESIDENT
