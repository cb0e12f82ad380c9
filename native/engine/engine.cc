#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <set>

#include "base/check.h"
#include "base/random.h"
#include "base/tree.h"

namespace tp {

namespace {

Dims dims_of(const EngineSpec& s) {
  Dims d{};
  d.hidden = s.model.hidden;
  d.vocab = s.model.vocab;
  d.local_vocab = s.model.vocab / s.size;
  d.inter = s.model.intermediate;
  d.moe_inter = s.model.moe_intermediate;
  d.experts = s.model.experts;
  d.top_k = s.model.top_k;
  d.all_leaves = s.model.leaves;
  d.leaves = s.model.leaves / s.size;
  d.rank = s.rank;
  d.size = s.size;
  d.candidates = s.limits.candidates;
  d.eps = static_cast<float>(s.model.eps);
  d.softcap = static_cast<float>(s.model.softcap);
  d.bfloat16 = s.dtype == "bfloat16";
  return d;
}

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
  if (s.device != "cpu") fail("TP_DEVICE", "this addon was not compiled with CUDA; use --device cpu");
  if (s.dtype != "bfloat16" && s.dtype != "float32") fail("TP_PLAN", "no dtype '%s'", s.dtype.c_str());
  if (s.collective != "local" && s.collective != "host")
    fail("TP_PLAN", "no collective '%s'", s.collective.c_str());
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

}  // namespace

Engine::Engine(EngineSpec spec) : spec_(std::move(spec)) {
  check_spec(spec_);
  dims_ = dims_of(spec_);
  backend_ = make_cpu_backend(spec_.isa.c_str(), spec_.threads);
  weights_ = std::make_unique<Weights>(spec_.tensors, *backend_);
  buffers_ = std::make_unique<Buffers>(spec_, dims_, *backend_);
  stats_ = {weights_->bytes(), buffers_->cache_bytes, 0, 0};
}

void Engine::prepare() {
  weights_->require_filled();
  program_ = std::make_unique<Program>(spec_, dims_, input_, *weights_, *buffers_, *backend_);
}

void Engine::begin(const Batch& batch) {
  const auto& limits = spec_.limits;
  const size_t tokens = batch.tokens.size(), rows = batch.rows.size();
  if (tokens == 0 || tokens > static_cast<size_t>(limits.tokens) || rows > static_cast<size_t>(limits.rows))
    fail("TP_BATCH", "a step of %zu tokens and %zu rows; the limits are %d and %d", tokens, rows,
         limits.tokens, limits.rows);
  if (batch.positions.size() != tokens || batch.slots.size() != tokens || batch.targets.size() != rows ||
      batch.temperature.size() != rows || batch.top_k.size() != rows || batch.top_p.size() != rows ||
      batch.seed.size() != rows || batch.sequence.size() != rows)
    fail("TP_BATCH", "the arrays of a step of %zu tokens and %zu rows differ in length", tokens, rows);
  for (size_t t = 0; t < tokens; t++) {
    if (batch.tokens[t] < 0 || batch.tokens[t] >= dims_.vocab)
      fail("TP_BATCH", "token id %d is outside the vocabulary of %d", batch.tokens[t], dims_.vocab);
    if (batch.positions[t] < 0 || batch.positions[t] >= limits.positions)
      fail("TP_BATCH", "position %d is outside the %d positions of this run", batch.positions[t],
           limits.positions);
    if (batch.slots[t] < 0 || batch.slots[t] >= limits.sequences)
      fail("TP_BATCH", "slot %d of %d", batch.slots[t], limits.sequences);
  }
  for (size_t r = 0; r < rows; r++) {
    if (batch.rows[r] < 0 || static_cast<size_t>(batch.rows[r]) >= tokens)
      fail("TP_BATCH", "row %d of a step of %zu tokens", batch.rows[r], tokens);
    if (batch.targets[r] < -1 || batch.targets[r] >= dims_.vocab)
      fail("TP_BATCH", "target id %d is outside the vocabulary of %d", batch.targets[r], dims_.vocab);
    check_sampling(batch.temperature[r], batch.top_k[r], batch.top_p[r]);
  }
  batch_ = batch;
  input_ = {static_cast<int>(tokens), static_cast<int>(rows),    batch_.tokens.data(),
            batch_.positions.data(),  batch_.slots.data(),       batch_.rows.data(),
            batch_.targets.data(),    batch_.temperature.data(), batch_.top_k.data(),
            batch_.top_p.data(),      batch_.seed.data(),        batch_.sequence.data()};
  trace_.clear();
  rotate_angles();
}

void Engine::check_sampling(float temperature, int top_k, float top_p) const {
  if (!(temperature >= 0) || std::isinf(temperature) || top_k < 0 || !(top_p >= 0 && top_p <= 1))
    fail("TP_BATCH", "sampling with temperature %g, top-k %d and top-p %g", static_cast<double>(temperature),
         top_k, static_cast<double>(top_p));
  // A filter chooses among gathered candidates: any leaf may hold all that it keeps.
  const int leaf = dims_.vocab / dims_.all_leaves;
  int needed = 1;
  if (temperature > 0 && top_k > 0)
    needed = std::min(top_k, leaf);
  else if (temperature > 0 && top_p < 1)
    needed = leaf;
  if (needed > dims_.candidates)
    fail("TP_BATCH", "top-k %d and top-p %g need %d candidates of every virtual shard, the limit is %d",
         top_k, static_cast<double>(top_p), needed, dims_.candidates);
}

void Engine::rotate_angles() {
  // As the reference: frequency and angle in fp32; cosine and sine of that angle, correctly rounded to fp32.
  std::set<int> done;
  for (size_t l = 0; l < spec_.layers.size(); l++) {
    const LayerSpec& layer = spec_.layers[l];
    const int rope = buffers_->rope_of_layer[l];
    if (!done.insert(rope).second) continue;
    for (int i = 0; i < layer.rotary_pairs; i++) {
      const auto frequency = static_cast<float>(std::pow(layer.rope_theta, -2.0 * i / layer.head_dim));
      for (int t = 0; t < input_.tokens; t++) {
        const float angle = frequency * static_cast<float>(input_.position[t]);
        const size_t at =
            static_cast<size_t>(t) * static_cast<size_t>(layer.rotary_pairs) + static_cast<size_t>(i);
        buffers_->cosine[static_cast<size_t>(rope)][at] =
            static_cast<float>(std::cos(static_cast<double>(angle)));
        buffers_->sine[static_cast<size_t>(rope)][at] =
            static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
  }
}

int Engine::run(int from) {
  if (!program_) fail("TP_PLAN", "run before prepare");
  if (input_.tokens == 0) fail("TP_BATCH", "run before begin");
  const auto& calls = program_->calls();
  const int count = static_cast<int>(calls.size());
  if (from < 0 || from > count) fail("TP_PLAN", "run from step %d of %d", from, count);
  const bool host = spec_.collective == "host";
  // The step before `from` was a sync: its result is complete only now.
  if (host && from > 0 && calls[static_cast<size_t>(from - 1)].sync != Program::Sync::none)
    leave(calls[static_cast<size_t>(from - 1)]);
  for (int i = from; i < count; i++) {
    const Program::Call& call = calls[static_cast<size_t>(i)];
    if (call.sync != Program::Sync::none) {
      if (host) return i;
      leave(call);
      continue;
    }
    call.run();
    count_reads(call);
    leave(call);
  }
  return count;
}

void Engine::leave(const Program::Call& call) {
  if (fault_) add_fault(call);
  if (spec_.trace) add_trace(call);
}

void Engine::count_reads(const Program::Call& call) {
  stats_.read_bytes += call.weight_bytes;
  if (call.expert_bytes > 0) {
    int distinct = 0;
    for (int e = 0; e < dims_.experts; e++)
      distinct += buffers_->expert_start[e + 1] > buffers_->expert_start[e];
    stats_.read_bytes += call.expert_bytes * distinct;
    if (call.stage == "gateUp") stats_.experts_read += distinct;
  }
  if (call.stage == "attention") {
    const LayerSpec& layer = spec_.layers[static_cast<size_t>(call.layer)];
    // Tokens of one sequence read the same keys: count the furthest of each slot once.
    std::vector<int> visible(static_cast<size_t>(spec_.limits.sequences), 0);
    for (int t = 0; t < input_.tokens; t++) {
      int& most = visible[static_cast<size_t>(input_.slot[t])];
      const int seen = input_.position[t] + 1;
      most = std::max(most, layer.window > 0 ? std::min(seen, layer.window) : seen);
    }
    for (int positions : visible)
      stats_.read_bytes += 2.0 * positions * layer.kv_heads * layer.head_dim *
                           static_cast<double>(dims_.bfloat16 ? sizeof(Bf16) : sizeof(float));
  }
}

void Engine::add_fault(const Program::Call& call) {
  if (call.stage != fault_->stage || call.layer != fault_->layer || call.outputs.empty()) return;
  const View& view = call.outputs[0];
  const auto hit = [&](int t) {
    return input_.position[t] == fault_->position && input_.slot[t] == fault_->slot;
  };
  const int rows = view.per_row ? input_.rows : input_.tokens;
  for (int r = 0; r < rows; r++) {
    if (!hit(view.per_row ? input_.row[r] : r)) continue;
    auto* element = static_cast<uint32_t*>(view.data) + int64_t{r} * view.width;
    *element ^= view.rounded && dims_.bfloat16 ? 0x10000u : 1u;
  }
}

void Engine::add_trace(const Program::Call& call) {
  if (call.outputs.empty()) return;
  const bool sharded = call.outputs[0].sharded;
  const int rows = call.outputs[0].per_row ? input_.rows : input_.tokens;
  const int parts = sharded ? dims_.leaves : 1;
  TraceEntry entry{call.stage, call.layer, parts, sharded,
                   std::vector<uint64_t>(static_cast<size_t>(rows) * parts, 0)};
  for (size_t o = 0; o < call.outputs.size(); o++) {
    const View& view = call.outputs[o];
    const int per_group = view.width / view.groups, part_width = per_group / parts;
    for (int r = 0; r < rows; r++) {
      const auto* row = static_cast<const uint32_t*>(view.data) + int64_t{r} * view.width;
      for (int p = 0; p < parts; p++) {
        uint64_t hash = 0;
        for (int g = 0; g < view.groups; g++)
          for (int i = 0; i < part_width; i++)
            hash += hash_element(row[g * per_group + p * part_width + i],
                                 static_cast<uint64_t>(g) * part_width + i);
        entry.hashes[static_cast<size_t>(r) * parts + p] += mix64(hash + o);
      }
    }
  }
  trace_.push_back(std::move(entry));
}

Engine::SyncBuffers Engine::sync_buffers(int index) const {
  if (!program_) fail("TP_PLAN", "sync buffers before prepare");
  const auto& calls = program_->calls();
  if (index < 0 || index >= static_cast<int>(calls.size()) ||
      calls[static_cast<size_t>(index)].sync == Program::Sync::none)
    fail("TP_PLAN", "step %d is no sync point", index);
  const Program::Call& call = calls[static_cast<size_t>(index)];
  if (call.sync == Program::Sync::all_reduce) {
    const View& view = call.outputs[0];
    return {static_cast<float*>(view.data), int64_t{input_.tokens} * view.width, nullptr, 0};
  }
  const int64_t floats =
      int64_t{input_.rows} * dims_.leaves * (kSummaryFloats + int64_t{kCandidateFloats} * dims_.candidates);
  return {buffers_->candidates, floats, buffers_->gathered, floats * dims_.size};
}

Engine::Result Engine::result() const {
  for (int r = 0; r < input_.rows; r++)
    if (buffers_->token[r] >= dims_.vocab || std::isnan(buffers_->logprob[r]))
      fail("TP_NATIVE",
           "the logits behind position %d of slot %d are not numbers; do the weights hold NaN or infinity?",
           input_.position[input_.row[r]], input_.slot[input_.row[r]]);
  return {buffers_->token, buffers_->logprob, buffers_->target_logprob, input_.rows};
}

Engine::Named Engine::named(const std::string& name) const {
  const Buffers& b = *buffers_;
  const Dims& d = dims_;
  const auto floats = [](float* data, int width, bool per_row = false) {
    return Named{View{data, width, per_row, false}, false};
  };
  size_t q_width = 0;
  for (const LayerSpec& l : spec_.layers)
    q_width = std::max(q_width, static_cast<size_t>(l.heads) * l.head_dim);
  if (name == "hidden") return floats(b.hidden, d.hidden);
  if (name == "normed") return floats(b.normed, d.hidden);
  if (name == "q") return floats(b.q, static_cast<int>(q_width));
  if (name == "attention") return floats(b.attention, static_cast<int>(q_width));
  if (name == "attnSum") return floats(b.attn_sum, d.hidden);
  if (name == "denseIn") return floats(b.dense_in, d.hidden);
  if (name == "expertIn") return floats(b.expert_in, d.hidden);
  if (name == "routerLogits") return floats(b.router_logits, d.experts);
  if (name == "routeWeight") return floats(b.route_weight, d.top_k);
  if (name == "routeIndex") return {View{b.route_index, d.top_k, false, false}, true};
  if (name == "denseAct") return floats(b.dense_act, d.inter);
  if (name == "expertAct") return floats(b.expert_act, d.top_k * d.moe_inter);
  if (name == "ffnSum") return floats(b.ffn_sum, 2 * d.hidden);
  if (name == "logits") return floats(b.logits, d.local_vocab, true);
  fail("TP_PLAN", "no buffer '%s'", name.c_str());
}

std::vector<float> Engine::read_buffer(const std::string& name) const {
  const Named buffer = named(name);
  const size_t count =
      static_cast<size_t>(buffer.view.per_row ? input_.rows : input_.tokens) * buffer.view.width;
  std::vector<float> out(count);
  if (buffer.integers)
    std::copy_n(static_cast<const int*>(buffer.view.data), count, out.begin());
  else
    std::memcpy(out.data(), buffer.view.data, count * sizeof(float));
  return out;
}

void Engine::write_buffer(const std::string& name, const float* values, size_t count) {
  const Named buffer = named(name);
  const size_t room =
      static_cast<size_t>(buffer.view.per_row ? input_.rows : input_.tokens) * buffer.view.width;
  if (buffer.integers || count != room)
    fail("TP_PLAN", "buffer %s takes %zu floats, not %zu", name.c_str(), room, count);
  std::memcpy(buffer.view.data, values, count * sizeof(float));
}

Stats Engine::take_stats() {
  const Stats taken = stats_;
  stats_.read_bytes = stats_.experts_read = 0;
  return taken;
}

double Engine::read_bandwidth(double seconds) {
  constexpr uint64_t kPiece = uint64_t{4} << 20;
  const auto total = static_cast<uint64_t>(weights_->bytes());
  const uint64_t piece = std::min(kPiece, total);
  const int pieces = static_cast<int>(total / piece);  // a last part is left out
  const auto* memory = static_cast<const char*>(weights_->memory());
  volatile uint64_t sink = 0;  // keeps the loads
  double bytes = 0;
  const auto start = std::chrono::steady_clock::now();
  std::chrono::duration<double> spent{};
  do {
    backend_->parallel(pieces, [&](int i, int) {
      sink = backend_->ops().stream(memory + static_cast<uint64_t>(i) * piece, piece);
    });
    bytes += static_cast<double>(piece) * pieces;
    spent = std::chrono::steady_clock::now() - start;
  } while (spent.count() < seconds);
  return bytes / spent.count() / 1e9;
}

}  // namespace tp
