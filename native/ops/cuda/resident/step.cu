// The resident kernel: a block a multiprocessor runs the stages of the plan one after the other. Eight warps
// compute; the ninth walks the same plan and keeps the ring full of what they will need, so that memory is
// read while blocks wait for each other, for a peer or for the router.
#include <algorithm>

#include "ops/cuda/resident/attention.cuh"
#include "ops/cuda/resident/attn_out.cuh"
#include "ops/cuda/resident/down.cuh"
#include "ops/cuda/resident/ffn_out.cuh"
#include "ops/cuda/resident/gate_up.cuh"
#include "ops/cuda/resident/logits.cuh"
#include "ops/cuda/resident/qkv.cuh"

namespace tp::cuda {

namespace resident {

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
  // A stage has up to two matrices. All go through one loop, which keeps its code in the instruction cache.
#pragma unroll 1
  for (int at = 2 * p.from; at < 2 * p.to; at++) {
    const int step = at / 2;
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
    const int matrix = 2 * stage + at % 2;
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
        if (at % 2 == of.turns) continue;
        schedule = of.schedule(p);
        rows = of.row(0, at % 2, r), unit_stride = kUnitRows * of.columns, part_stride = of.part();
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
  const auto most = static_cast<int>(min(c.peers.floats, int64_t{kMostTokens} * 2 * kRowLength));
  empty(c.peers, c.sum_turn, most),
      empty(c.peers, turn_before(c.sum_turn), most);  // that the launch before has read
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
  p.counters->sum_turn = c.sum_turn;
}

/// What products exchange; it lies behind the activations and is free while attention runs, which takes both.
constexpr int kExchangeBytes = 2 * kRoomFloats * static_cast<int>(sizeof(float));

/// Shared memory that the stages' activations take at least for `tokens` tokens. What has more room needs
/// fewer turns.
int least_act_bytes(const Decoder& decoder, const Dims& d, int tokens, int blocks) {
  // Weights of four norms; later a token's inputs of router, dense MLP and experts, or rows of all.
  int most = std::max(4, tokens) * stride_of(2 * d.hidden);
  most = std::max({most, tokens * stride_of(2 * d.inter), tokens * d.top_k * 2 * d.moe_inter});
  const int units = (d.hidden / kUnitRows + blocks - 1) / blocks;
  for (const LayerArgs& layer : decoder.layers) {
    const int columns = layer.attn_out.columns, turns = columns > kAttentionPart ? 2 : 1;
    most = std::max(most, tokens * stride_of(2 * columns / turns) +
                              (turns > 1 ? units * kSumFloats * static_cast<int>(sizeof(float)) : 0));
    const size_t room =
        layer.attention.heads.head_dim == 256 ? sizeof(AttentionRoom<256>) : sizeof(AttentionRoom<512>);
    most = std::max(most, static_cast<int>(room) - kExchangeBytes);
  }
  return most;
}

/// Room of a slot's rows in the ring.
int slot_bytes_of(const Decoder& decoder, const Dims& d) {
  int most = std::max({2 * d.hidden, 2 * d.inter, 2 * d.moe_inter * kUnitRows / halves_of(d.leaves)});
  for (const LayerArgs& layer : decoder.layers)
    most = std::max(most, 2 * std::min(layer.attn_out.columns, kAttentionPart));
  // Whole lines: a copy to half of one and half of the next is slower.
  return up(std::max(kSlotRows * most, kTileBytes), 128);
}

LayerKind kind_of(const Decoder& decoder, bool full) {
  for (const LayerArgs& layer : decoder.layers)
    if ((layer.attention.heads.window == 0) == full)
      return {layer.attention.heads, layer.attention.cache.capacity};
  return {};
}

bool same_kind(const LayerArgs& layer, const LayerKind& kind) {
  const Heads &a = layer.attention.heads, &b = kind.heads;
  return a.heads == b.heads && a.kv_heads == b.kv_heads && a.head_dim == b.head_dim && a.window == b.window &&
         a.rotary_pairs == b.rotary_pairs && layer.attention.cache.capacity == kind.capacity;
}

bool power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

/// Whether the stages take these shapes.
bool fits(const Decoder& decoder, const Dims& d) {
  const bool model = d.bfloat16 && d.hidden == 8 * kWarps * kWholePieces &&
                     d.inter == 8 * kDensePieces * d.leaves && d.moe_inter == 8 * kLeafPieces * d.leaves &&
                     d.local_vocab % kUnitRows == 0 && d.top_k <= kMostTopK && d.experts <= kMostExperts &&
                     d.experts >= d.top_k && power_of_two(d.leaves);
  return model && std::all_of(decoder.layers.begin(), decoder.layers.end(), [&](const LayerArgs& layer) {
           const Heads& h = layer.attention.heads;
           const int chunks = layer.attn_out.columns / kAttentionChunk;
           return (h.head_dim == 256 || h.head_dim == 512) &&
                  h.heads / h.kv_heads <= most_group(h.head_dim) && h.rotary_pairs % (h.head_dim / 64) == 0 &&
                  same_kind(layer, kind_of(decoder, h.window == 0)) &&
                  (h.window == 0 || h.window >= tile_of(h.head_dim)) &&  // a tile wraps once at most
                  layer.attn_out.columns % kAttentionChunk == 0 && power_of_two(chunks) &&
                  chunks <= kGroup * kWarps && chunks % d.leaves == 0;
         });
}

class Step final : public Fused {
 public:
  Step(const Decoder& decoder, const Dims& d, const PeerMemory* peers, CudaBackend& cuda)
      : decoder_(decoder), cuda_(cuda) {
    p_.dims = d;
    p_.logits = decoder.logits;
    p_.by_blocks = divider(blocks());
    p_.by_expert_units = divider(d.moe_inter / kUnitColumns);
    p_.layer_count = static_cast<int>(decoder.layers.size());
    for (const bool full : {false, true}) p_.kinds[full] = kind_of(decoder, full);
    const size_t bytes = decoder.layers.size() * sizeof(LayerArgs);
    auto* const layers = static_cast<LayerArgs*>(cuda.allocate(bytes));
    cuda.write(layers, decoder.layers.data(), bytes);
    p_.layers = layers;
    p_.counters = static_cast<Counters*>(cuda.allocate(sizeof(Counters)));
    p_.slot_bytes = slot_bytes_of(decoder, d);
    const auto values_to_come = [&](size_t bytes) {
      auto* const memory = static_cast<float*>(cuda.allocate(bytes));
      check(cudaMemsetAsync(memory, kNothingByte, bytes, cuda.stream()), "emptying memory");
      return memory;
    };
    if (peers) {
      p_.peers = *peers;
    } else {
      p_.peers.size = 1;
      p_.peers.floats = int64_t{2} * d.hidden * kMostTokens;
      p_.peers.inbox[0] = values_to_come(p_.peers.inbox_bytes());
    }
    size_t rows = 0, kv_rows = 0;
    int kv_heads = 0;
    for (const LayerArgs& layer : decoder.layers) {
      const Heads& h = layer.attention.heads;
      const int long_chunks = layer.attention.cache.capacity / (tile_of(h.head_dim) * kLongChunk) + 1;
      p_.partial_chunks =
          std::max({p_.partial_chunks, kFewChunks, h.window > 0 ? 0 : std::min(kMostChunks, long_chunks)});
      rows = std::max(rows, static_cast<size_t>(h.heads) * h.head_dim);
      kv_heads = std::max(kv_heads, h.kv_heads);
      kv_rows = std::max(kv_rows, static_cast<size_t>(h.kv_heads) * h.head_dim);
    }
    const size_t partials = kMostTokens * static_cast<size_t>(p_.partial_chunks);
    p_.partial = static_cast<float*>(cuda.allocate(partials * rows * sizeof(float)));
    p_.partial_scale = static_cast<float2*>(cuda.allocate(partials * rows / 256 * sizeof(float2)));
    p_.q = values_to_come(kMostTokens * rows * sizeof(float));
    p_.kv = values_to_come(kMostTokens * 2 * kv_rows * sizeof(float));
    p_.scores = values_to_come(size_t{kMostTokens} * kMostExperts * sizeof(float));
    p_.chunks_done = static_cast<uint32_t*>(cuda.allocate(sizeof(uint32_t) * kMostTokens * kv_heads));
    const auto rows_of = [&](size_t width) {  // (T, width)
      return static_cast<Bf16*>(cuda.allocate(sizeof(Bf16) * kMostTokens * width));
    };
    const auto hidden = static_cast<size_t>(d.hidden), moe = static_cast<size_t>(d.moe_inter);
    p_.activations = {rows_of(hidden),
                      rows_of(rows),
                      rows_of(hidden),
                      rows_of(hidden),
                      rows_of(hidden),
                      rows_of(static_cast<size_t>(d.inter)),
                      rows_of(static_cast<size_t>(d.top_k) * moe)};
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, run_stages), "asking for a kernel's needs");
    room_ =
        cuda.shared_memory() - static_cast<int>(attributes.sharedSizeBytes) - kResidualBytes - kExchangeBytes;
  }

  bool takes(const Input& in) const override {
    // A token's row is one block's work.
    return in.tokens <= std::min(kMostTokens, cuda_.processors()) && in.rows <= in.tokens &&
           slots_for(in.tokens) >= kUnitSlots;
  }

  void run(int from, int to, const Input& in) override {
    Parameters p = p_;
    p.in = in;
    p.from = from, p.to = to;
    p.by_tokens = divider(in.tokens);
    // Blocks that have a unit of o_proj less than others are there first.
    p.first_owner = std::min(p.dims.hidden / kUnitRows % blocks(), blocks() - in.tokens);
    p.slots = slots_for(in.tokens);
    p.act_bytes = (room_ - p.slots * p.slot_bytes) & -128;
    const size_t shared =
        static_cast<size_t>(p.slots * p.slot_bytes + kResidualBytes + p.act_bytes + kExchangeBytes);
    const dim3 grid(static_cast<unsigned>(blocks()));
    cuda_.launch_together(run_stages, grid, kBlock, shared, p);
    if (to > p.layer_count * kStages) summarise_logits(p.logits, p.dims, in, cuda_);
  }

  int blocks() const override { return cuda_.processors(); }
  void measure(uint64_t* marks) override { p_.marks = marks; }

 private:
  int slots_for(int tokens) const {
    return std::min(kMostSlots,
                    (room_ - 128 - least_act_bytes(decoder_, p_.dims, tokens, blocks())) / p_.slot_bytes);
  }

  Decoder decoder_;
  CudaBackend& cuda_;
  Parameters p_{};
  int room_ = 0;  // bytes of shared memory for ring and activations
};

}  // namespace resident

std::unique_ptr<Fused> CudaBackend::fuse(const Decoder& decoder, const Dims& dims, const PeerMemory* peers) {
  if (decoder.layers.empty() || !resident::fits(decoder, dims)) return nullptr;
  return std::make_unique<resident::Step>(decoder, dims, peers, *this);
}

}  // namespace tp::cuda
