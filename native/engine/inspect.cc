#include "engine/inspect.h"

#include <algorithm>

#include "base/check.h"
#include "base/random.h"

namespace tp {

Inspector::Named Inspector::named(const std::string& name) const {
  const Buffers& b = buffers_;
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

std::vector<float> Inspector::read(const std::string& name) const {
  const auto [view, integers] = named(name);
  const size_t count = static_cast<size_t>(rows_of(view)) * view.width;
  std::vector<float> out(count);
  if (!integers) {
    backend_.read(out.data(), view.data, count * sizeof(float));
    return out;
  }
  std::vector<int> whole(count);
  backend_.read(whole.data(), view.data, count * sizeof(int));
  std::copy(whole.begin(), whole.end(), out.begin());
  return out;
}

void Inspector::write(const std::string& name, const float* values, size_t count) {
  const auto [view, integers] = named(name);
  const size_t room = static_cast<size_t>(rows_of(view)) * view.width;
  if (integers || count != room)
    fail("TP_PLAN", "buffer %s takes %zu floats, not %zu", name.c_str(), room, count);
  backend_.write(view.data, values, count * sizeof(float));
}

void Inspector::add_fault(const Program::Call& call, const Fault& fault) {
  if (call.stage != fault.stage || call.layer != fault.layer || call.outputs.empty()) return;
  const View& view = call.outputs[0];
  for (int r = 0; r < rows_of(view); r++) {
    const auto t = static_cast<size_t>(view.per_row ? batch_.rows[static_cast<size_t>(r)] : r);
    if (batch_.positions[t] != fault.position || batch_.slots[t] != fault.slot) continue;
    auto* const element = static_cast<uint32_t*>(view.data) + int64_t{r} * view.width;
    uint32_t bits;
    backend_.read(&bits, element, sizeof bits);
    bits ^= view.rounded && dims_.bfloat16 ? 0x10000u : 1u;
    backend_.write(element, &bits, sizeof bits);
  }
}

TraceEntry Inspector::trace(const Program::Call& call) const {
  const bool sharded = call.outputs[0].sharded;
  const int rows = rows_of(call.outputs[0]), parts = sharded ? dims_.leaves : 1;
  TraceEntry entry{call.stage, call.layer, parts, sharded,
                   std::vector<uint64_t>(static_cast<size_t>(rows) * parts, 0)};
  for (size_t o = 0; o < call.outputs.size(); o++) {
    const View& view = call.outputs[o];
    const int per_group = view.width / view.groups, part_width = per_group / parts;
    std::vector<uint32_t> bits(static_cast<size_t>(rows) * view.width);
    backend_.read(bits.data(), view.data, bits.size() * sizeof(uint32_t));
    for (int r = 0; r < rows; r++) {
      const uint32_t* row = bits.data() + int64_t{r} * view.width;
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
  return entry;
}

}  // namespace tp
