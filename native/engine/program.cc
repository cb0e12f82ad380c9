#include "engine/program.h"

#include <iterator>
#include <map>

#include "base/check.h"

namespace tp {

namespace {

/// Resolves the weights of one step, with the shapes that its op needs.
class Resolver {
 public:
  Resolver(const StepSpec& step, const Weights& weights) : step_(step), weights_(weights) {}

  const Bf16* operator()(const char* role, std::vector<int64_t> shape) {
    const auto found = step_.weights.find(role);
    if (found == step_.weights.end())
      fail("TP_PLAN", "step %s of layer %d has no weight '%s'", step_.op.c_str(), step_.layer, role);
    double elements = 1;
    for (int64_t n : shape) elements *= static_cast<double>(n);
    bytes += elements * sizeof(Bf16);
    return weights_.get(found->second, shape);
  }
  bool has(const char* role) const { return step_.weights.count(role) > 0; }

  double bytes = 0;

 private:
  const StepSpec& step_;
  const Weights& weights_;
};

}  // namespace

Program::Program(const EngineSpec& spec, const Dims& d, const Input& in, const Weights& weights, Buffers& b,
                 Backend& backend) {
  const Ops& ops = backend.ops();
  const int64_t h = d.hidden;
  const auto call = [&](auto op, auto args) {
    return [op, args, &d, &in, &backend] { op(args, d, in, backend); };
  };
  const auto layer_of = [&](const StepSpec& step) -> const LayerSpec& {
    if (step.layer < 0 || step.layer >= static_cast<int>(spec.layers.size()))
      fail("TP_PLAN", "step %s names layer %d of %zu", step.op.c_str(), step.layer, spec.layers.size());
    return spec.layers[static_cast<size_t>(step.layer)];
  };
  const auto expert_start = [&](const StepSpec& step) {
    layer_of(step);  // checked
    return b.expert_start + static_cast<int64_t>(step.layer) * (d.experts + 1);
  };
  const View hidden{b.hidden, d.hidden, false, false};

  decoder_.layers.resize(spec.layers.size());
  const auto layer_args = [&](const StepSpec& step) -> LayerArgs& {
    layer_of(step);  // checked
    return decoder_.layers[static_cast<size_t>(step.layer)];
  };

  using Build = std::function<void(const StepSpec&, Resolver&, Call&)>;
  const auto heads_of = [](const LayerSpec& l) {
    return Heads{l.heads, l.kv_heads, l.head_dim, l.window, l.rotary_pairs};
  };

  const std::map<std::string, Build> builders = {
      {"embed",
       [&](const StepSpec&, Resolver& w, Call& c) {
         EmbedArgs a{};
         a.table = w("table", {d.vocab, h});
         a.hidden = b.hidden;
         a.scale = round_to(d.bfloat16, static_cast<float>(spec.model.embed_scale));
         w.bytes = 0;  // a row a token, not the table
         c.run = call(ops.embed, a);
         c.outputs = {hidden};
       }},
      {"qkv",
       [&](const StepSpec& step, Resolver& w, Call& c) {
         const LayerSpec& l = layer_of(step);
         const int64_t q_rows = int64_t{l.heads} * l.head_dim, kv_rows = int64_t{l.kv_heads} * l.head_dim;
         const auto rope = static_cast<size_t>(b.rope_of_layer[static_cast<size_t>(step.layer)]);
         QkvArgs a{};
         a.hidden = b.hidden;
         a.norm = w("norm", {h});
         a.q_weight = w("q", {q_rows, h});
         a.k_weight = w("k", {kv_rows, h});
         a.v_weight = l.k_eq_v ? nullptr : w("v", {kv_rows, h});
         a.q_norm = w("qNorm", {l.head_dim});
         a.k_norm = w("kNorm", {l.head_dim});
         a.cosine = b.ropes[rope].cosine;
         a.sine = b.ropes[rope].sine;
         a.normed = b.normed;
         a.q = b.q;
         a.kv = b.kv;
         a.heads = heads_of(l);
         a.cache = b.caches[static_cast<size_t>(step.layer)];
         c.run = call(ops.qkv, a);
         layer_args(step).qkv = a;
         c.outputs = {{b.q, static_cast<int>(q_rows), false, true}};
       }},
      {"attention",
       [&](const StepSpec& step, Resolver&, Call& c) {
         const LayerSpec& l = layer_of(step);
         const AttentionArgs a{b.q, b.attention, heads_of(l), b.caches[static_cast<size_t>(step.layer)]};
         c.run = call(ops.attention, a);
         layer_args(step).attention = a;
         c.reads_cache = true;
         c.outputs = {{b.attention, l.heads * l.head_dim, false, true}};
       }},
      {"attnOut",
       [&](const StepSpec& step, Resolver& w, Call& c) {
         const LayerSpec& l = layer_of(step);
         const int columns = l.heads * l.head_dim;
         const AttnOutArgs a{b.attention, w("o", {h, columns}), b.attn_sum, columns};
         c.run = call(ops.attn_out, a);
         layer_args(step).attn_out = a;
       }},
      {"route",
       [&](const StepSpec& step, Resolver& w, Call& c) {
         RouteArgs a{};
         a.sum = b.attn_sum;
         a.hidden = b.hidden;
         a.post_norm = w("postAttentionNorm", {h});
         a.dense_norm = w("denseNorm", {h});
         a.expert_norm = w("expertNorm", {h});
         a.scale = w("scale", {h});
         a.router = w("router", {d.experts, h});
         a.per_expert_scale = w("perExpertScale", {d.experts});
         a.normed = b.normed;
         a.router_logits = b.router_logits;
         a.dense_in = b.dense_in;
         a.expert_in = b.expert_in;
         a.route_index = b.route_index;
         a.route_weight = b.route_weight;
         a.expert_start = expert_start(step);
         a.assignment = b.assignment;
         c.run = call(ops.route, a);
         layer_args(step).route = a;
         c.outputs = {hidden,
                      {b.route_weight, d.top_k, false, false, 1, false},
                      {b.route_index, d.top_k, false, false, 1, false}};
       }},
      {"gateUp",
       [&](const StepSpec& step, Resolver& w, Call& c) {
         GateUpArgs a{};
         a.dense_in = b.dense_in;
         a.expert_in = b.expert_in;
         a.gate = w("gate", {d.inter, h});
         a.up = w("up", {d.inter, h});
         c.weight_bytes = w.bytes;
         a.expert_gate_up = w("expertGateUp", {d.experts, 2 * d.moe_inter, h});
         c.expert_bytes = (w.bytes - c.weight_bytes) / d.experts;
         w.bytes = c.weight_bytes;
         a.expert_start = expert_start(step);
         a.assignment = b.assignment;
         a.dense_act = b.dense_act;
         a.expert_act = b.expert_act;
         c.run = call(ops.gate_up, a);
         layer_args(step).gate_up = a;
         c.outputs = {{b.dense_act, d.inter, false, true},
                      {b.expert_act, d.top_k * d.moe_inter, false, true, d.top_k}};
       }},
      {"down",
       [&](const StepSpec& step, Resolver& w, Call& c) {
         DownArgs a{};
         a.dense_act = b.dense_act;
         a.expert_act = b.expert_act;
         a.route_weight = b.route_weight;
         a.down = w("down", {h, d.inter});
         c.weight_bytes = w.bytes;
         a.expert_down = w("expertDown", {d.experts, h, d.moe_inter});
         c.expert_bytes = (w.bytes - c.weight_bytes) / d.experts;
         w.bytes = c.weight_bytes;
         a.expert_start = expert_start(step);
         a.assignment = b.assignment;
         a.sum = b.ffn_sum;
         c.run = call(ops.down, a);
         layer_args(step).down = a;
       }},
      {"ffnOut",
       [&](const StepSpec& step, Resolver& w, Call& c) {
         FfnOutArgs a{};
         a.sum = b.ffn_sum;
         a.dense_norm = w("denseNorm", {h});
         a.expert_norm = w("expertNorm", {h});
         a.norm = w("norm", {h});
         a.layer_scalar = w("layerScalar", {1});
         a.hidden = b.hidden;
         c.run = call(ops.ffn_out, a);
         layer_args(step).ffn_out = a;
         c.outputs = {hidden};
       }},
      {"logits",
       [&](const StepSpec&, Resolver& w, Call& c) {
         LogitsArgs a{};
         a.hidden = b.hidden;
         a.norm = w("norm", {h});
         a.table = w("table", {d.vocab, h}) + int64_t{d.rank} * d.local_vocab * h;
         w.bytes = static_cast<double>(d.local_vocab) * static_cast<double>(h) * sizeof(Bf16);
         a.normed = b.normed;
         a.logits = b.logits;
         a.candidates = b.candidates;
         c.run = call(ops.logits, a);
         decoder_.logits = a;
         c.outputs = {{b.logits, d.local_vocab, true, true, 1, false}};
       }},
      {"sample",
       [&](const StepSpec&, Resolver&, Call& c) {
         c.run = call(ops.sample, SampleArgs{b.gathered, b.token, b.logprob, b.target_logprob});
       }},
  };
  const std::map<std::string, View> reduced = {
      {"attnSum", {b.attn_sum, d.hidden, false, false, 1, false}},
      {"ffnSum", {b.ffn_sum, 2 * d.hidden, false, false, 1, false}},
  };

  for (const StepSpec& step : spec.steps) {
    Call c;
    c.stage = step.stage;
    c.layer = step.layer;
    if (step.op == "allReduce") {
      const auto found = reduced.find(step.buffer);
      if (found == reduced.end()) fail("TP_PLAN", "no buffer '%s' to all-reduce", step.buffer.c_str());
      c.sync = Sync::all_reduce;
      c.floats_per_token = found->second.width;
      c.outputs = {found->second};
    } else if (step.op == "allGather") {
      if (step.buffer != "candidates") fail("TP_PLAN", "no buffer '%s' to all-gather", step.buffer.c_str());
      c.sync = Sync::all_gather;
      c.floats_per_row = int64_t{d.leaves} * (kSummaryFloats + int64_t{kCandidateFloats} * d.candidates);
    } else {
      const auto found = builders.find(step.op);
      if (found == builders.end()) fail("TP_PLAN", "no op '%s'", step.op.c_str());
      Resolver resolve(step, weights);
      found->second(step, resolve, c);
      c.weight_bytes = resolve.bytes;
    }
    calls_.push_back(std::move(c));
  }
  number_stages();
}

void Program::number_stages() {
  static const char* const kOrder[] = {"qkv", "attention", "attnOut", "route", "gateUp", "down", "ffnOut"};
  constexpr int kStages = std::size(kOrder);
  const int all = static_cast<int>(decoder_.layers.size()) * kStages;
  int number = 0;
  for (Call& call : calls_) {
    if (call.sync != Sync::none) continue;
    if (number == all ? call.stage == "logits"
                      : call.layer == number / kStages && call.stage == kOrder[number % kStages])
      call.stage_number = number++;
  }
  if (number <= all) decoder_.layers.clear();
}

}  // namespace tp
