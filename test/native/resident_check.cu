// The resident step against the ops one by one, against itself stage by stage, a token alone against all
// together, and ranks that sum inside the kernel against one rank.
#include "test/native/resident_check.h"

namespace tp::test {

void test_fused(const ModelShape& shape, int layer_count, int positions,
                const std::vector<std::vector<int>>& steps, const std::vector<int>& batches, int repeats) {
  const int stages = layer_count * 7 + 1;
  Model m(1, layer_count, kMostTokens, positions, kMostTokens, shape);
  set_angles(m);
  const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
  if (!fused) return expect(false, "the fused step does not take the real shape", 0);
  Step in(kMostTokens, kMostTokens);
  const Ops& ops = gpu->ops();
  for (const std::vector<int>& at : steps)
    for (const int T : batches) {
      where = "fused step at position " + std::to_string(at[0]) + " T=" + std::to_string(T);
      set_step(in, at, shape.vocab);
      const Input input = in.device(T, T);
      const int before = failures;
      // One layer by stages: where the first difference is.
      const auto compare = [&](const char* what, const float* from, int width,
                               const std::function<void()>& by_ops, const std::function<void()>& by_fused) {
        std::vector<float> a(static_cast<size_t>(T) * width), b = a;
        by_ops();
        gpu->read(a.data(), from, a.size() * sizeof(float));
        by_fused();
        gpu->read(b.data(), from, b.size() * sizeof(float));
        const double far = distance(b, a);
        expect(far < 0.01, what, far);
      };
      for (const int l : {0, shape.period - 1}) {
        const Layer& layer = m.layers[static_cast<size_t>(l)];
        ops.embed(m.embed, m.d, input, *gpu);
        const int n = l * 7, q = layer.attn_out.columns;
        compare(
            "attention", layer.attention.attention, q,
            [&] {
              ops.qkv(layer.qkv, m.d, input, *gpu);
              ops.attention(layer.attention, m.d, input, *gpu);
            },
            [&] { fused->run(n, n + 2, input); });
        compare(
            "attn_out", layer.attn_out.sum, kHidden, [&] { ops.attn_out(layer.attn_out, m.d, input, *gpu); },
            [&] { fused->run(n + 2, n + 3, input); });
        compare(
            "route", layer.route.hidden, kHidden, [&] { ops.route(layer.route, m.d, input, *gpu); },
            [&] {
              ops.embed(m.embed, m.d, input, *gpu);
              fused->run(n + 3, n + 4, input);
            });
        compare(
            "route weights", layer.route.route_weight, m.d.top_k,
            [&] {
              ops.embed(m.embed, m.d, input, *gpu);
              ops.route(layer.route, m.d, input, *gpu);
            },
            [&] {
              ops.embed(m.embed, m.d, input, *gpu);
              fused->run(n + 3, n + 4, input);
            });
        compare(
            "dense act", layer.gate_up.dense_act, m.d.inter,
            [&] { ops.gate_up(layer.gate_up, m.d, input, *gpu); }, [&] { fused->run(n + 4, n + 5, input); });
        compare(
            "expert act", layer.gate_up.expert_act, m.d.top_k * m.d.moe_inter,
            [&] { ops.gate_up(layer.gate_up, m.d, input, *gpu); }, [&] { fused->run(n + 4, n + 5, input); });
        compare(
            "down", layer.down.sum, 2 * kHidden, [&] { ops.down(layer.down, m.d, input, *gpu); },
            [&] { fused->run(n + 5, n + 6, input); });
        std::vector<float> kept(static_cast<size_t>(T) * kHidden);
        gpu->read(kept.data(), layer.ffn_out.hidden, kept.size() * sizeof(float));
        compare(
            "ffn_out", layer.ffn_out.hidden, kHidden, [&] { ops.ffn_out(layer.ffn_out, m.d, input, *gpu); },
            [&] {
              gpu->write(layer.ffn_out.hidden, kept.data(), kept.size() * sizeof(float));
              fused->run(n + 6, n + 7, input);
            });
      }
      if (failures > before + 8) return;
      ops.embed(m.embed, m.d, input, *gpu);
      for (const Layer& l : m.layers) m.layer(l, input);
      ops.logits(m.logits, m.d, input, *gpu);
      const std::vector<float> by_ops = logits_of(m, T);
      ops.embed(m.embed, m.d, input, *gpu);
      fused->run(0, stages, input);
      const std::vector<float> whole = logits_of(m, T);
      std::printf("%s: logits %.3g from the ops'\n", where.c_str(), distance(whole, by_ops));
      // A token whose last two experts are nearly equal may choose another one: the stages above are compared
      // closely.
      expect(distance(whole, by_ops) < 0.6, "the fused step against the ops", distance(whole, by_ops));
      for (int again = 0; again < repeats; again++) {
        ops.embed(m.embed, m.d, input, *gpu);
        fused->run(0, stages, input);
        expect(logits_of(m, T) == whole, "the same step again", again);
      }
      ops.embed(m.embed, m.d, input, *gpu);
      for (int s = 0; s < stages; s++) fused->run(s, s + 1, input);
      expect(logits_of(m, T) == whole, "stage by stage", 0);
      if (T > 8) {  // another kernel
        ops.embed(m.embed, m.d, in.device(8, 8), *gpu);
        fused->run(0, stages, in.device(8, 8));
        const std::vector<float> few = logits_of(m, 8);
        equal_bits("the first eight of more", few,
                   {whole.begin(), whole.begin() + static_cast<int64_t>(few.size())});
      }
      for (int t = 0; t < T; t++) {  // alone: rows of the input begin at its own
        Step one(1, 1);
        one.token.host[0] = in.token.host[t], one.position.host[0] = in.position.host[t];
        one.slot.host[0] = in.slot.host[t], one.row.host[0] = 0, one.target.host[0] = -1;
        one.temperature.host[0] = 0, one.top_k.host[0] = 0, one.top_p.host[0] = 1, one.seed.host[0] = 1;
        one.sequence.host[0] = 0;
        one.upload();
        if (t > 0) break;  // angles of other tokens lie elsewhere
        const Input alone = one.device(1, 1);
        ops.embed(m.embed, m.d, alone, *gpu);
        fused->run(0, stages, alone);
        const std::vector<float> single = logits_of(m, 1);
        expect(std::equal(single.begin(), single.end(),
                          whole.begin() + static_cast<int64_t>(t) * m.d.local_vocab),
               "a token alone", t);
      }
      if (failures == before) std::printf("ok %s\n", where.c_str());
      std::fflush(stdout);
    }
}

/// The choice of experts from given logits: ties, what is no number, and experts that several tokens share.
/// `copies` of eight tokens.
void test_choice(const ModelShape& shape, int copies) {
  const int E = shape.experts, K = shape.top_k;
  where = "choice of " + std::to_string(K) + " of " + std::to_string(E) + " experts";
  const int before = failures;
  Model m(1, 1, kMostTokens, 64, kMostTokens, shape);
  set_angles(m);
  const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
  const RouteArgs& a = m.layers[0].route;
  Step in(kMostTokens, kMostTokens);
  set_step(in, {0}, shape.vocab);
  const std::function<float(int)> patterns[] = {[](int) { return 0.5f; },
                                                [](int e) { return e == 1 ? NAN : 1.0f; },
                                                [](int e) { return static_cast<float>(e); },
                                                [](int e) { return static_cast<float>(e / 2 % 7); },
                                                [&](int e) { return e == E - 2 ? 3.0f : -INFINITY; },
                                                [&](int e) { return e == E - 1 ? 200.0f : -200.0f; },
                                                [](int e) { return static_cast<float>(e * 37 % 11) / 4; },
                                                [](int e) { return static_cast<float>(-e * e % 13); }};
  std::vector<float> logits;
  const int tokens = static_cast<int>(std::size(patterns)) * copies;
  for (int t = 0; t < tokens; t++)
    for (int e = 0; e < E; e++) logits.push_back(patterns[static_cast<size_t>(t) % std::size(patterns)](e));
  std::vector<Bf16> scale(static_cast<size_t>(E));
  gpu->read(scale.data(), a.per_expert_scale, scale.size() * sizeof(Bf16));
  std::vector<float> together;
  for (const int T : {tokens, 1}) {  // together, and the last token alone
    const float* const from = logits.data() + static_cast<int64_t>(tokens - T) * (T == 1) * E;
    const int first = T == 1 ? tokens - 1 : 0;
    gpu->ops().embed(m.embed, m.d, in.device(T, T), *gpu);
    gpu->write(a.router_logits, from, static_cast<size_t>(T) * E * sizeof(float));
    fused->run(4, 5, in.device(T, T));
    std::vector<int> index(static_cast<size_t>(T) * K), start(static_cast<size_t>(E) + 1);
    std::vector<float> weight(index.size()), expected_weight;
    gpu->read(index.data(), a.route_index, index.size() * sizeof(int));
    gpu->read(weight.data(), a.route_weight, weight.size() * sizeof(float));
    gpu->read(start.data(), a.expert_start, start.size() * sizeof(int));
    std::vector<int> expected, expected_start(start.size());
    for (int t = 0; t < T; t++) {
      std::vector<int> order(static_cast<size_t>(E));
      for (int e = 0; e < E; e++) order[static_cast<size_t>(e)] = e;
      const float* const own = from + static_cast<int64_t>(t) * E;
      const bool numbers = (first + t) % static_cast<int>(std::size(patterns)) != 1;
      if (numbers)
        std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return own[x] > own[y]; });
      double sum = 0;
      for (int k = 0; k < K; k++) sum += std::exp(double(own[order[k]]) - own[order[0]]);
      for (int k = 0; k < K; k++) {
        const int e = order[static_cast<size_t>(k)];
        expected.push_back(e);
        expected_weight.push_back(numbers
                                      ? static_cast<float>(std::exp(double(own[e]) - own[order[0]]) / sum) *
                                            to_float(scale[static_cast<size_t>(e)])
                                      : NAN);
        for (int after = e + 1; after <= E; after++) expected_start[static_cast<size_t>(after)]++;
      }
    }
    equal_bits("which experts", index, expected);
    equal_bits("how often each", start, expected_start);
    expect(distance(weight, expected_weight) < 1e-6, "weights", distance(weight, expected_weight));
    if (T == 1)
      equal_bits("weights of a token alone", weight, {together.end() - K, together.end()});
    else
      together = weight;
  }
  if (failures == before) std::printf("ok %s\n", where.c_str());
}

/// Stretches of a step against the same stages one by one: where does a stretch first leave other bits?
/// `share`: one of how many stretches is tried, drawn at random.
void test_stretches(const ModelShape& shape, int layer_count, int positions, const std::vector<int>& at,
                    const std::vector<int>& batches, int repeats, uint32_t share) {
  const int stages = std::min(layer_count, 2) * 7;
  Model m(1, layer_count, kMostTokens, positions, kMostTokens, shape);
  set_angles(m);
  const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
  for (const int T : batches) {
    where = "stretches T=" + std::to_string(T);
    const int before = failures;
    Step in(kMostTokens, kMostTokens);
    set_step(in, at, shape.vocab);
    const Input input = in.device(T, T);
    const auto left = [&](int step) {  // what stage `step` leaves behind
      const Layer& l = m.layers[static_cast<size_t>(step / 7)];
      const float* const from[] = {l.qkv.q,         l.attention.attention, l.attn_out.sum,
                                   l.route.hidden,  l.gate_up.expert_act,  l.down.sum,
                                   l.ffn_out.hidden};
      const int width[] = {l.attn_out.columns,        l.attn_out.columns, kHidden, kHidden,
                           m.d.top_k * m.d.moe_inter, 2 * kHidden,        kHidden};
      std::vector<float> out(static_cast<size_t>(T) * width[step % 7]);
      gpu->read(out.data(), from[step % 7], out.size() * sizeof(float));
      return out;
    };
    std::vector<std::vector<float>> alone;
    gpu->ops().embed(m.embed, m.d, input, *gpu);
    for (int s = 0; s < stages; s++) fused->run(s, s + 1, input), alone.push_back(left(s));
    for (int from = 0; from < stages; from++)
      for (int to = from + 1; to <= stages; to++) {
        if (random_bits() % share) continue;
        int wrong = 0, most = 0;
        size_t first = 0;
        for (int again = 0; again < repeats; again++) {
          gpu->ops().embed(m.embed, m.d, input, *gpu);
          for (int s = 0; s < from; s++) fused->run(s, s + 1, input);
          fused->run(from, to, input);
          const auto now = left(to - 1);
          int differ = 0;
          for (size_t i = 0; i < now.size(); i++)
            if (std::memcmp(&now[i], &alone[static_cast<size_t>(to - 1)][i], sizeof(float)) != 0) {
              if (differ++ == 0) first = i;
            }
          wrong += differ > 0, most = std::max(most, differ);
        }
        if (wrong)
          std::printf("T=%d stages %d..%d: %d of %d runs differ, %d elements, first %zu\n", T, from, to - 1,
                      wrong, repeats, most, first);
        expect(wrong == 0, "a stretch of stages against each alone", wrong);
        if (wrong) break;
      }
    if (failures == before) std::printf("ok %s\n", where.c_str());
    std::fflush(stdout);
  }
}

/// Ranks whose kernels sum through each other's inboxes, against one rank: the same bits.
void test_ranks(const ModelShape& shape, int size, int layer_count, int positions,
                const std::vector<std::vector<int>>& steps, const std::vector<int>& batches) {
  int devices = 0;
  cuda::check(cudaGetDeviceCount(&devices), "counting devices");
  where = std::to_string(size) + " ranks";
  if (devices < size) {
    std::printf("skipped: %s on %d devices\n", where.c_str(), devices);
    return;
  }
  const int stages = layer_count * 7 + 1;
  Model whole(1, layer_count, kMostTokens, positions, kMostTokens, shape);
  set_angles(whole);
  const auto fused = gpu->fuse(decoder_of(whole), whole.d, nullptr);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int r = 0; r < size; r++)
    ranks.push_back(std::make_unique<Rank>(shape, r, size, layer_count, positions));
  join(ranks);
  for (const std::vector<int>& at : steps)
    for (const int T : batches) {
      where =
          std::to_string(size) + " ranks at position " + std::to_string(at[0]) + " T=" + std::to_string(T);
      const int before = failures;
      Step in(kMostTokens, kMostTokens);
      set_step(in, at, shape.vocab);
      gpu->enter();
      gpu->ops().embed(whole.embed, whole.d, in.device(T, T), *gpu);
      fused->run(0, stages, in.device(T, T));
      const std::vector<float> expected = logits_of(whole, T), hidden = hidden_of(whole, T);
      for (int again = 0; again < 2; again++) {
        for (auto& rank : ranks) rank->start(in, T, stages);
        for (int r = 0; r < size; r++) {
          const Model& m = ranks[static_cast<size_t>(r)]->model;
          const std::vector<float> mine = logits_of(m, T);
          std::vector<float> part;
          for (int t = 0; t < T; t++) {
            const auto from = expected.begin() + static_cast<int64_t>(t) * shape.vocab + r * m.d.local_vocab;
            part.insert(part.end(), from, from + m.d.local_vocab);
          }
          equal_bits("a rank's logits", mine, part);
          equal_bits("a rank's residual stream", hidden_of(m, T), hidden);
        }
      }
      if (failures == before) std::printf("ok %s\n", where.c_str());
      std::fflush(stdout);
    }
}

/// Steps recorded and started again, two in a row without the host in between.
void test_replay(const ModelShape& shape, int layer_count, int positions, int T) {
  where = "replay T=" + std::to_string(T);
  const int before = failures, stages = layer_count * 7 + 1;
  gpu->enter();
  Model m(1, layer_count, kMostTokens, positions, kMostTokens, shape);
  set_angles(m);
  const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
  Step in(kMostTokens, kMostTokens);
  set_step(in, {7, 33}, shape.vocab);
  const Input input = in.device(T, T);
  const auto step = [&] {
    gpu->ops().embed(m.embed, m.d, input, *gpu);
    fused->run(0, stages, input);
  };
  step();
  const std::vector<float> expected = logits_of(m, T);
  for (int i = 0; i < 2; i++) {
    gpu->replay(77, step), gpu->replay(77, step);
    equal_bits("a recorded step", logits_of(m, T), expected);
  }
  if (failures == before) std::printf("ok %s\n", where.c_str());
}

}  // namespace tp::test
