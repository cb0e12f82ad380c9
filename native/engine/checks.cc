#include "engine/checks.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/tree.h"
#include "ops/backend.h"

namespace tp {

namespace {

void check_layer(const EngineSpec& s, size_t index) {
  const LayerSpec& l = s.layers[index];
  const int leaves = s.model.leaves / s.size;
  if (l.heads <= 0 || l.kv_heads <= 0 || l.heads % l.kv_heads || l.heads % leaves)
    fail("TP_PLAN", "layer %zu: %d query heads do not divide into %d KV heads and %d virtual shards", index,
         l.heads, l.kv_heads, leaves);
  if (l.head_dim <= 0 || l.rotary_pairs < 0 || 2 * l.rotary_pairs > l.head_dim)
    fail("TP_PLAN", "layer %zu: %d rotary pairs in heads of %d", index, l.rotary_pairs, l.head_dim);
  if (l.window < 0) fail("TP_PLAN", "layer %zu: a window of %d positions", index, l.window);
}

void check_sampling(const EngineSpec& s, float temperature, int top_k, float top_p) {
  if (!(temperature >= 0) || std::isinf(temperature) || top_k < 0 || !(top_p >= 0 && top_p <= 1))
    fail("TP_BATCH", "sampling with temperature %g, top-k %d and top-p %g", static_cast<double>(temperature),
         top_k, static_cast<double>(top_p));
  // A filter chooses among gathered candidates: any leaf may hold all that it keeps.
  const int leaf = s.model.vocab / s.model.leaves;
  int needed = 1;
  if (temperature > 0 && top_k > 0)
    needed = std::min(top_k, leaf);
  else if (temperature > 0 && top_p < 1)
    needed = leaf;
  if (needed > s.limits.candidates)
    fail("TP_BATCH", "top-k %d and top-p %g need %d candidates of every virtual shard, the limit is %d",
         top_k, static_cast<double>(top_p), needed, s.limits.candidates);
}

}  // namespace

void check_spec(const EngineSpec& s) {
  const auto positive = [](const char* what, int value) {
    if (value <= 0) fail("TP_PLAN", "%s is %d, must be positive", what, value);
  };
  positive("hidden size", s.model.hidden);
  positive("vocabulary", s.model.vocab);
  positive("dense width", s.model.intermediate);
  positive("expert width", s.model.moe_intermediate);
  positive("experts", s.model.experts);
  positive("top-k experts", s.model.top_k);
  positive("virtual shards", s.model.leaves);
  positive("threads", s.threads);
  positive("ranks", s.size);
  positive("token limit", s.limits.tokens);
  positive("row limit", s.limits.rows);
  positive("sequence limit", s.limits.sequences);
  positive("position limit", s.limits.positions);
  positive("candidate limit", s.limits.candidates);
  if (s.device != "cpu" && s.device != "cuda") fail("TP_PLAN", "no device '%s'", s.device.c_str());
  if (s.device == "cuda" && !cuda_version())
    fail("TP_DEVICE", "this addon was not compiled with CUDA; use --device cpu");
  if (s.dtype != "bfloat16" && s.dtype != "float32") fail("TP_PLAN", "no dtype '%s'", s.dtype.c_str());
  const bool on_device = s.collective == "peer" || s.collective == "nccl";
  if (s.collective != "local" && s.collective != "host" && !on_device)
    fail("TP_PLAN", "no collective '%s'", s.collective.c_str());
  if (on_device && s.device != "cuda")
    fail("TP_PLAN", "collective %s joins GPUs, not device '%s'", s.collective.c_str(), s.device.c_str());
  if (s.collective == "local" && s.size > 1)
    fail("TP_PLAN", "a local collective cannot join %d ranks", s.size);
  if (s.rank < 0 || s.rank >= s.size) fail("TP_PLAN", "rank %d of %d", s.rank, s.size);
  const int leaves = s.model.leaves;
  if (leaves > kMaxLeaves || (leaves & (leaves - 1)) || leaves % s.size)
    fail("TP_PLAN", "%d virtual shards cannot be shared by %d ranks; their number is 1, 2, 4 or 8", leaves,
         s.size);
  if (s.model.vocab >= (1 << 24))
    fail("TP_PLAN", "vocabulary of %d tokens: ids must fit 24 bits", s.model.vocab);
  if (s.model.vocab % leaves || s.model.intermediate % (leaves / s.size) ||
      s.model.moe_intermediate % (leaves / s.size))
    fail("TP_PLAN", "vocabulary %d and widths %d and %d must divide into %d virtual shards", s.model.vocab,
         s.model.intermediate, s.model.moe_intermediate, leaves);
  if (s.model.top_k > s.model.experts)
    fail("TP_PLAN", "%d experts a token of only %d", s.model.top_k, s.model.experts);
  for (size_t i = 0; i < s.layers.size(); i++) check_layer(s, i);
}

void check_batch(const Batch& batch, const EngineSpec& s) {
  const auto& limits = s.limits;
  const size_t tokens = batch.tokens.size(), rows = batch.rows.size();
  if (tokens == 0 || tokens > static_cast<size_t>(limits.tokens) || rows > static_cast<size_t>(limits.rows))
    fail("TP_BATCH", "a step of %zu tokens and %zu rows; the limits are %d and %d", tokens, rows,
         limits.tokens, limits.rows);
  if (batch.positions.size() != tokens || batch.slots.size() != tokens || batch.targets.size() != rows ||
      batch.temperature.size() != rows || batch.top_k.size() != rows || batch.top_p.size() != rows ||
      batch.seed.size() != rows || batch.sequence.size() != rows)
    fail("TP_BATCH", "the arrays of a step of %zu tokens and %zu rows differ in length", tokens, rows);
  for (size_t t = 0; t < tokens; t++) {
    if (batch.tokens[t] < 0 || batch.tokens[t] >= s.model.vocab)
      fail("TP_BATCH", "token id %d is outside the vocabulary of %d", batch.tokens[t], s.model.vocab);
    if (batch.positions[t] < 0 || batch.positions[t] >= limits.positions)
      fail("TP_BATCH", "position %d is outside the %d positions of this run", batch.positions[t],
           limits.positions);
    if (batch.slots[t] < 0 || batch.slots[t] >= limits.sequences)
      fail("TP_BATCH", "slot %d of %d", batch.slots[t], limits.sequences);
  }
  for (size_t r = 0; r < rows; r++) {
    if (batch.rows[r] < 0 || static_cast<size_t>(batch.rows[r]) >= tokens)
      fail("TP_BATCH", "row %d of a step of %zu tokens", batch.rows[r], tokens);
    if (batch.targets[r] < -1 || batch.targets[r] >= s.model.vocab)
      fail("TP_BATCH", "target id %d is outside the vocabulary of %d", batch.targets[r], s.model.vocab);
    check_sampling(s, batch.temperature[r], batch.top_k[r], batch.top_p[r]);
  }
}

void check_burst(const Batch& batch, const EngineSpec& s, int steps) {
  if (s.collective == "host")
    fail("TP_BATCH", "a burst needs a collective that stays on the device, not %s", s.collective.c_str());
  if (batch.tokens.empty() || batch.rows.size() != batch.tokens.size())
    fail("TP_BATCH", "a burst of %zu tokens with %zu rows", batch.tokens.size(), batch.rows.size());
  for (size_t t = 0; t < batch.tokens.size(); t++) {
    if (batch.rows[t] != static_cast<int>(t))
      fail("TP_BATCH", "a burst whose row %zu is token %d", t, batch.rows[t]);
    if (batch.positions[t] + steps > s.limits.positions)
      fail("TP_BATCH", "%d steps from position %d pass the %d positions of this run", steps,
           batch.positions[t], s.limits.positions);
  }
}

}  // namespace tp
