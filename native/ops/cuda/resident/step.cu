// The resident step as its caller sees it: which kernel takes a step, its memory, its launch.
#include <algorithm>

#include "ops/cuda/resident/step.h"

namespace tp::cuda {

namespace resident {

namespace {

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
                  chunks <= kMostParts * kWarps && chunks % d.leaves == 0;
         });
}

/// How a kernel shares out a multiprocessor's memory.
struct Plan {
  Kernel kernel;
  int room;  // bytes for ring and activations
  explicit Plan(const Kernel& kernel_, CudaBackend& cuda) : kernel(kernel_) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel.run), "asking for a kernel's needs");
    room = cuda.shared_memory() - static_cast<int>(attributes.sharedSizeBytes) - kernel.other_bytes;
  }
};

class Step final : public Fused {
 public:
  Step(const Decoder& decoder, const Dims& d, const PeerMemory* peers, CudaBackend& cuda)
      : decoder_(decoder), cuda_(cuda), few_(up_to_8::kernel(), cuda), many_(up_to_16::kernel(), cuda) {
    const auto tokens = static_cast<size_t>(most_tokens());
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
      p_.peers.floats = int64_t{2} * d.hidden * most_tokens();
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
    const size_t partials = tokens * static_cast<size_t>(p_.partial_chunks);
    p_.partial = static_cast<float*>(cuda.allocate(partials * rows * sizeof(float)));
    p_.partial_scale = static_cast<float2*>(cuda.allocate(partials * rows / 256 * sizeof(float2)));
    p_.q = values_to_come(tokens * rows * sizeof(float));
    p_.kv = values_to_come(tokens * 2 * kv_rows * sizeof(float));
    p_.scores = values_to_come(tokens * kMostExperts * sizeof(float));
    p_.chunks_done = static_cast<uint32_t*>(cuda.allocate(sizeof(uint32_t) * tokens * kv_heads));
    const auto rows_of = [&](size_t width) {  // (T, width)
      return static_cast<Bf16*>(cuda.allocate(sizeof(Bf16) * tokens * width));
    };
    const auto hidden = static_cast<size_t>(d.hidden), moe = static_cast<size_t>(d.moe_inter);
    p_.activations = {rows_of(hidden),
                      rows_of(rows),
                      rows_of(hidden),
                      rows_of(hidden),
                      rows_of(hidden),
                      rows_of(static_cast<size_t>(d.inter)),
                      rows_of(static_cast<size_t>(d.top_k) * moe)};
  }

  bool takes(const Input& in) const override {
    // A token's row is one block's work.
    return in.tokens <= std::min(most_tokens(), cuda_.processors()) && in.rows <= in.tokens &&
           slots_for(in.tokens) >= kUnitSlots;
  }

  void run(int from, int to, const Input& in) override {
    const Plan& plan = plan_for(in.tokens);
    Parameters p = p_;
    p.in = in;
    p.from = from, p.to = to;
    p.by_tokens = divider(in.tokens);
    // Blocks that have a unit of o_proj less than others are there first.
    p.first_owner = std::min(p.dims.hidden / kUnitRows % blocks(), blocks() - in.tokens);
    p.slots = slots_for(in.tokens);
    p.act_bytes = (plan.room - p.slots * p.slot_bytes) & -128;
    const auto shared = static_cast<size_t>(p.slots * p.slot_bytes + p.act_bytes + plan.kernel.other_bytes);
    const dim3 grid(static_cast<unsigned>(blocks()));
    cuda_.launch_together(plan.kernel.run, grid, kBlock, shared, p);
    if (to > p.layer_count * kStages) summarise_logits(p.logits, p.dims, in, cuda_);
  }

  int blocks() const override { return cuda_.processors(); }
  void measure(uint64_t* marks) override { p_.marks = marks; }

 private:
  int most_tokens() const { return many_.kernel.tokens; }
  const Plan& plan_for(int tokens) const { return tokens <= few_.kernel.tokens ? few_ : many_; }
  int slots_for(int tokens) const {
    const Plan& plan = plan_for(tokens);
    const int acts = plan.kernel.least_act_bytes(decoder_, p_.dims, tokens, blocks());
    return std::min(kMostSlots, (plan.room - 128 - acts) / p_.slot_bytes);
  }

  Decoder decoder_;
  CudaBackend& cuda_;
  Parameters p_{};
  Plan few_, many_;
};

}  // namespace

}  // namespace resident

std::unique_ptr<Fused> CudaBackend::fuse(const Decoder& decoder, const Dims& dims, const PeerMemory* peers) {
  if (decoder.layers.empty() || !resident::fits(decoder, dims)) return nullptr;
  return std::make_unique<resident::Step>(decoder, dims, peers, *this);
}

}  // namespace tp::cuda
