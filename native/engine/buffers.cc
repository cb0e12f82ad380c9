#include "engine/buffers.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace tp {

Buffers::Buffers(const EngineSpec& spec, const Dims& d, Backend& backend) {
  const size_t t = static_cast<size_t>(spec.limits.tokens), r = static_cast<size_t>(spec.limits.rows);
  const auto floats = [&](size_t rows, size_t width) {
    return static_cast<float*>(backend.allocate(bytes_of({rows, width, sizeof(float)})));
  };
  const auto ints = [&](size_t count) {
    return static_cast<int*>(backend.allocate(bytes_of({count, sizeof(int)})));
  };
  // What the host sums between steps must be within its reach; slow for a GPU, but it works anywhere.
  const auto synced = [&](size_t rows, size_t width) {
    if (spec.collective != "host") return floats(rows, width);
    return static_cast<float*>(backend.allocate_shared(bytes_of({rows, width, sizeof(float)})));
  };
  size_t q_width = 0, kv_width = 0;
  for (const LayerSpec& layer : spec.layers) {
    q_width = std::max(q_width, static_cast<size_t>(layer.heads) * layer.head_dim);
    kv_width = std::max(kv_width, static_cast<size_t>(layer.kv_heads) * layer.head_dim);
  }
  hidden = floats(t, d.hidden);
  normed = floats(std::max(t, r), d.hidden);
  q = floats(t, q_width);
  kv = floats(t, 2 * kv_width);
  attention = floats(t, q_width);
  attn_sum = synced(t, d.hidden);
  router_logits = floats(t, d.experts);
  dense_in = floats(t, d.hidden);
  expert_in = floats(t, d.hidden);
  route_weight = floats(t, d.top_k);
  route_index = ints(t * d.top_k);
  expert_start = ints(spec.layers.size() * (static_cast<size_t>(d.experts) + 1));
  assignment = ints(t * d.top_k);
  dense_act = floats(t, d.inter);
  expert_act = floats(t * d.top_k, d.moe_inter);
  ffn_sum = synced(t, 2 * static_cast<size_t>(d.hidden));
  logits = floats(r, d.local_vocab);
  const size_t summary = static_cast<size_t>(d.leaves) * (kSummaryFloats + kCandidateFloats * d.candidates);
  candidates = synced(r, summary);
  gathered = d.size == 1 ? candidates : synced(r * d.size, summary);
  token = ints(r);
  logprob = floats(r, 1);
  target_logprob = floats(r, 1);
  input = static_cast<uint32_t*>(backend.allocate(bytes_of({3 * t + 7 * r, sizeof(uint32_t)})));
  experts_read = static_cast<uint64_t*>(backend.allocate(sizeof(uint64_t)));
  history_token = static_cast<int*>(backend.allocate_shared(bytes_of({kHistory, r, sizeof(int)})));
  history_logprob = static_cast<float*>(backend.allocate_shared(bytes_of({kHistory, r, sizeof(float)})));
  history_ns = static_cast<uint64_t*>(backend.allocate_shared(kHistory * sizeof(uint64_t)));
  fed_steps = static_cast<uint64_t*>(backend.allocate_shared(sizeof(uint64_t)));

  std::vector<std::pair<std::pair<double, int>, int>> distinct;  // ((theta, dim), pairs)
  for (const LayerSpec& layer : spec.layers) {
    const auto rope = std::make_pair(std::make_pair(layer.rope_theta, layer.head_dim), layer.rotary_pairs);
    auto found = std::find(distinct.begin(), distinct.end(), rope);
    if (found == distinct.end()) {
      found = distinct.insert(distinct.end(), rope);
      const auto pairs = static_cast<size_t>(layer.rotary_pairs);
      std::vector<float> frequency;  // fp32, as the reference has it
      for (size_t i = 0; i < pairs; i++)
        frequency.push_back(
            static_cast<float>(std::pow(layer.rope_theta, -2.0 * static_cast<double>(i) / layer.head_dim)));
      float* const kept = floats(1, pairs);
      backend.write(kept, frequency.data(), pairs * sizeof(float));
      ropes.push_back({kept, floats(t, pairs), floats(t, pairs), layer.rotary_pairs});
    }
    rope_of_layer.push_back(static_cast<int>(found - distinct.begin()));

    // A ring must keep the window of the step's first token while its last token is already stored.
    const int64_t ring = int64_t{layer.window} + spec.limits.tokens - 1;
    const auto capacity = static_cast<size_t>(
        layer.window > 0 ? std::min<int64_t>(ring, spec.limits.positions) : spec.limits.positions);
    const size_t bytes =
        bytes_of({static_cast<size_t>(spec.limits.sequences), static_cast<size_t>(layer.kv_heads), capacity,
                  static_cast<size_t>(layer.head_dim), d.bfloat16 ? sizeof(Bf16) : sizeof(float)});
    caches.push_back({backend.allocate(bytes), backend.allocate(bytes), static_cast<int>(capacity)});
    cache_bytes += 2 * static_cast<double>(bytes);
  }
}

}  // namespace tp
