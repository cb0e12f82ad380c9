// Compares every CUDA op with its CPU twin and with itself (other batch, other TP degree, again).
#include "ops/cuda/grouped/grouped.h"
#include "test/native/resident_check.h"

namespace tp::test {

namespace {

struct Shape {
  const char* name;
  int hidden, heads, kv_heads, head_dim, window, rotary_pairs, inter, moe_inter, experts, top_k, vocab,
      leaves, positions;
  bool k_eq_v;
};

Dims dims_of(const Shape& s, bool bfloat16, int candidates = 1) {
  Dims d{};
  d.hidden = s.hidden, d.vocab = s.vocab, d.local_vocab = s.vocab, d.inter = s.inter,
  d.moe_inter = s.moe_inter;
  d.experts = s.experts, d.top_k = s.top_k, d.leaves = d.all_leaves = s.leaves, d.rank = 0, d.size = 1;
  d.candidates = candidates, d.eps = 1e-6f, d.softcap = 30, d.bfloat16 = bfloat16;
  return d;
}

/// Runs the op on the GPU a second time and expects the same bits in `out`.
void again(const char* what, Floats& out, const std::function<void()>& run) {
  const auto before = out.download();
  gpu->write(out.device, std::vector<float>(out.host.size(), NAN).data(), out.host.size() * sizeof(float));
  run();
  equal_bits(what, out.download(), before);
}

/// Calls run(first, count) for parts of T tokens that go the same way as all together: each token alone, or,
/// where many go together, the first, some in the middle and the last.
void in_parts(int T, bool together, int least, const std::function<void(int, int)>& run) {
  if (!together) {
    for (int t = 0; t < T; t++) run(t, 1);
    return;
  }
  for (const int first : {0, (T - least) / 2, T - least}) run(first, least);
}
/// Expects rows of `width` floats that a part gave to be those of the whole.
void same_rows(const char* what, const Floats& part, const std::vector<float>& whole, int first, int count,
               size_t width) {
  const auto all = part.download();
  const auto rows = [&](const std::vector<float>& x) {
    return std::vector<float>(x.begin() + first * width, x.begin() + (first + count) * width);
  };
  equal_bits(what, rows(all), rows(whole));
}

void test_attention_half(const Shape& s, bool bf, int T) {
  const Dims d = dims_of(s, bf);
  const bool prompts = T > 64;  // a few sequences with many tokens each, else many with two
  const int q_rows = s.heads * s.head_dim, kv_rows = s.kv_heads * s.head_dim,
            slots = prompts ? 3 : std::max(T / 2, 1), H = s.hidden;
  const int capacity = s.window > 0 ? std::min(s.window + T - 1, s.positions) : s.positions;
  const size_t cache_floats = size_t(slots) * s.kv_heads * capacity * s.head_dim;
  Floats hidden(T * H), cosine(T * s.rotary_pairs), sine(T * s.rotary_pairs), normed(T * H), q(T * q_rows),
      kv(T * 2 * kv_rows);
  Floats out(T * q_rows), sum(T * H);
  Weights norm(H), wq(size_t(q_rows) * H), wk(size_t(kv_rows) * H), wv(size_t(kv_rows) * H), qn(s.head_dim),
      kn(s.head_dim);
  Weights wo(size_t(H) * q_rows);
  Floats k32(bf ? 1 : cache_floats), v32(bf ? 1 : cache_floats);
  Weights k16(bf ? cache_floats : 1), v16(bf ? cache_floats : 1);
  fill(hidden, 3, bf), fill(norm, 0.3f, 1), fill(wq, 1.7f / std::sqrt(H)), fill(wk, 1.7f / std::sqrt(H)),
      fill(wv, 1.7f / std::sqrt(H));
  fill(qn, 0.1f, 0.5f), fill(kn, 0.1f, 0.5f), fill(k32, 1, bf), fill(v32, 1, bf), fill(k16, 1), fill(v16, 1);
  fill(wo, 1.7f / std::sqrt(q_rows));
  Step in(T, 1);
  // Two tokens a slot, neighbours in position: the second sees the first. Positions from the start, the
  // middle and the end.
  for (int t = 0; t < T; t++) {
    in.token.host[t] = 0;
    in.slot.host[t] = t % slots;
    const int last = s.positions - 3, base = (t % slots) % 3 == 0   ? last
                                             : (t % slots) % 3 == 1 ? last / 2
                                                                    : t % slots;
    in.position.host[t] = base + t / slots;
    if (!prompts) continue;
    const int slot = t * slots / T, begin = (slot * T + slots - 1) / slots;
    in.slot.host[t] = slot;
    in.position.host[t] = (slot == 0 ? 0 : (s.positions - T) / slot) + t - begin;
  }
  in.upload();
  for (int t = 0; t < T; t++)
    for (int i = 0; i < s.rotary_pairs; i++) {
      const float angle =
          static_cast<float>(in.position.host[t]) * std::pow(10000.0f, -2.0f * i / s.head_dim);
      cosine.host[t * s.rotary_pairs + i] = std::cos(angle);
      sine.host[t * s.rotary_pairs + i] = std::sin(angle);
    }
  cosine.upload(), sine.upload();
  const Heads heads{s.heads, s.kv_heads, s.head_dim, s.window, s.rotary_pairs};
  const Cache host_cache = bf ? Cache{k16.host.data(), v16.host.data(), capacity}
                              : Cache{k32.host.data(), v32.host.data(), capacity};
  const Cache device_cache =
      bf ? Cache{k16.device, v16.device, capacity} : Cache{k32.device, v32.device, capacity};
  const auto qkv_args = [&](bool device, int t0) {
    return device ? QkvArgs{hidden.device + t0 * H,
                            norm.device,
                            wq.device,
                            wk.device,
                            s.k_eq_v ? nullptr : wv.device,
                            qn.device,
                            kn.device,
                            cosine.device + t0 * s.rotary_pairs,
                            sine.device + t0 * s.rotary_pairs,
                            normed.device,
                            q.device + t0 * q_rows,
                            kv.device,
                            heads,
                            device_cache}
                  : QkvArgs{hidden.host.data(),
                            norm.host.data(),
                            wq.host.data(),
                            wk.host.data(),
                            s.k_eq_v ? nullptr : wv.host.data(),
                            qn.host.data(),
                            kn.host.data(),
                            cosine.host.data(),
                            sine.host.data(),
                            normed.host.data(),
                            q.host.data(),
                            kv.host.data(),
                            heads,
                            host_cache};
  };
  cpu->ops().qkv(qkv_args(false, 0), d, in.host(T, 1), *cpu);
  const auto run_qkv = [&] { gpu->ops().qkv(qkv_args(true, 0), d, in.device(T, 1), *gpu); };
  run_qkv();
  compare("q", q, bf);
  if (bf) {
    size_t differ = 0;
    const auto k = k16.download(), v = v16.download();
    double size = 0, difference = 0;
    for (size_t i = 0; i < k.size(); i++) {
      differ += std::abs(k[i] - k16.host[i]) > 2 || std::abs(v[i] - v16.host[i]) > 2;
      difference +=
          std::abs(to_float(k[i]) - to_float(k16.host[i])) + std::abs(to_float(v[i]) - to_float(v16.host[i]));
      size += std::abs(to_float(k[i])) + std::abs(to_float(v[i]));
    }
    expect(difference / size < 2e-3, "cache", difference / size);
  } else {
    compare("k cache", k32, bf), compare("v cache", v32, bf);
  }
  again("q again", q, run_qkv);
  if (T > 1) {
    const auto whole = q.download();
    in_parts(T, cuda::grouped::takes(qkv_args(true, 0), d, T), 9, [&](int t, int n) {
      q.poison();
      gpu->ops().qkv(qkv_args(true, t), d, in.device(n, 1, t), *gpu);
      same_rows("q: tokens apart", q, whole, t, n, q_rows);
    });
  }
  // From here on both sides go on from the same values.
  cpu->ops().qkv(qkv_args(false, 0), d, in.host(T, 1), *cpu);
  q.upload(), k16.upload(), v16.upload(), k32.upload(), v32.upload();
  cpu->ops().attention({q.host.data(), out.host.data(), heads, host_cache}, d, in.host(T, 1), *cpu);
  const auto run_attention = [&] {
    gpu->ops().attention({q.device, out.device, heads, device_cache}, d, in.device(T, 1), *gpu);
  };
  run_attention();
  compare("attention", out, bf);
  again("attention again", out, run_attention);
  if (T > 1) {
    const auto whole = out.download();
    const AttentionArgs args{q.device, out.device, heads, device_cache};
    in_parts(T, cuda::grouped::takes(args, d, T), 65, [&](int t, int n) {
      out.poison();  // the host's values too: upload them again below
      gpu->ops().attention({q.device + t * q_rows, out.device + t * q_rows, heads, device_cache}, d,
                           in.device(n, 1, t), *gpu);
      same_rows("attention: tokens apart", out, whole, t, n, q_rows);
    });
    out.host = whole;
    out.upload();
  } else {
    out.upload();
  }
  cpu->ops().attn_out({out.host.data(), wo.host.data(), sum.host.data(), q_rows}, d, in.host(T, 1), *cpu);
  const auto run_out = [&] {
    gpu->ops().attn_out({out.device, wo.device, sum.device, q_rows}, d, in.device(T, 1), *gpu);
  };
  run_out();
  compare("attn_out", sum, false);
  again("attn_out again", sum, run_out);
  const auto whole = sum.download();
  if (T > 1) {
    const AttnOutArgs args{out.device, wo.device, sum.device, q_rows};
    in_parts(T, cuda::grouped::takes(args, d, T), 9, [&](int t, int n) {
      sum.poison();
      gpu->ops().attn_out({out.device + t * q_rows, wo.device, sum.device + t * H, q_rows}, d,
                          in.device(n, 1, t), *gpu);
      same_rows("attn_out: tokens apart", sum, whole, t, n, H);
    });
  }
  for (int size = 2; size <= s.leaves; size *= 2) {
    const int part = q_rows / size;
    std::vector<std::vector<float>> sums;
    for (int rank = 0; rank < size; rank++) {
      Floats act(T * part), mine(T * H);
      Weights w(size_t(H) * part);
      for (int t = 0; t < T; t++)
        for (int i = 0; i < part; i++) act.host[t * part + i] = out.host[t * q_rows + rank * part + i];
      for (int r = 0; r < H; r++)
        for (int i = 0; i < part; i++)
          w.host[size_t(r) * part + i] = wo.host[size_t(r) * q_rows + rank * part + i];
      act.upload(), w.upload();
      Dims mine_d = d;
      mine_d.leaves = s.leaves / size;
      gpu->ops().attn_out({act.device, w.device, mine.device, part}, mine_d, in.device(T, 1), *gpu);
      sums.push_back(mine.download());
    }
    for (size_t i = 0; i < whole.size(); i++) {
      float leaves[kMaxLeaves];
      for (int rank = 0; rank < size; rank++) leaves[rank] = sums[rank][i];
      sums[0][i] = tree_sum(leaves, size);
    }
    equal_bits("attn_out: split over ranks", sums[0], whole);
  }
}

void test_ffn_half(const Shape& s, bool bf, int T) {
  const Dims d = dims_of(s, bf);
  const int H = s.hidden, K = s.top_k, E = s.experts;
  Floats sum(T * H), hidden(T * H), normed(T * H), logits(T * E), dense_in(T * H), expert_in(T * H),
      route_weight(T * K);
  Ints route_index(T * K), start(E + 1), assignment(T * K);
  Weights post(H), dn(H), en(H), scale(H), router(size_t(E) * H), per_expert(E);
  fill(sum, 2, false), fill(hidden, 3, bf), fill(post, 0.3f, 1), fill(dn, 0.3f, 1), fill(en, 0.3f, 1);
  fill(scale, 0.1f * std::sqrt(H), std::sqrt(H)), fill(router, 2.6f / std::sqrt(H)),
      fill(per_expert, 0.2f, 1);
  Step in(T, 1);
  in.upload();
  const std::vector<float> hidden_before = hidden.host;
  const auto args = [&](bool device, int t0) {
    return device ? RouteArgs{sum.device + t0 * H,
                              hidden.device + t0 * H,
                              post.device,
                              dn.device,
                              en.device,
                              scale.device,
                              router.device,
                              per_expert.device,
                              normed.device,
                              logits.device,
                              dense_in.device + t0 * H,
                              expert_in.device + t0 * H,
                              route_index.device + t0 * K,
                              route_weight.device + t0 * K,
                              start.device,
                              assignment.device}
                  : RouteArgs{sum.host.data(),         hidden.host.data(),       post.host.data(),
                              dn.host.data(),          en.host.data(),           scale.host.data(),
                              router.host.data(),      per_expert.host.data(),   normed.host.data(),
                              logits.host.data(),      dense_in.host.data(),     expert_in.host.data(),
                              route_index.host.data(), route_weight.host.data(), start.host.data(),
                              assignment.host.data()};
  };
  cpu->ops().route(args(false, 0), d, in.host(T, 1), *cpu);
  gpu->ops().route(args(true, 0), d, in.device(T, 1), *gpu);
  compare("hidden", hidden, bf), compare("dense_in", dense_in, bf), compare("expert_in", expert_in, bf);
  const auto index = route_index.download();
  int other = 0;
  for (int i = 0; i < T * K; i++) other += index[i] != route_index.host[i];
  // Two probabilities may lie closer than the backends' sums: then the order differs, not the arithmetic.
  expect(other <= (bf ? T * K / 20 + 2 : T * K / 50 + 2) && index[0] >= 0, "route index", other);
  if (other == 0) {
    compare("route weight", route_weight, bf);
    equal_bits("expert start", start.download(), start.host);
    equal_bits("assignment", assignment.download(), assignment.host);
  }
  const auto weights_before = route_weight.download();
  if (T > 1 && T <= 8) {
    const auto hidden_after = hidden.download();
    hidden.host = hidden_before;
    hidden.upload();
    for (int t = 0; t < T; t++) gpu->ops().route(args(true, t), d, in.device(1, 1, t), *gpu);
    equal_bits("route: a token alone, hidden", hidden.download(), hidden_after);
    equal_bits("route: a token alone, weight", route_weight.download(), weights_before);
    equal_bits("route: a token alone, index", route_index.download(), index);
  }
  // On from the CPU's routing, on both sides.
  route_weight.upload(), start.upload(), assignment.upload(), dense_in.upload(), expert_in.upload();

  Weights gate(size_t(s.inter) * H), up(size_t(s.inter) * H), expert_gate_up(size_t(E) * 2 * s.moe_inter * H);
  Weights down(size_t(H) * s.inter), expert_down(size_t(E) * H * s.moe_inter);
  fill(gate, 1.7f / std::sqrt(H)), fill(up, 1.7f / std::sqrt(H)), fill(expert_gate_up, 1.7f / std::sqrt(H));
  fill(down, 1.7f / std::sqrt(s.inter)), fill(expert_down, 1.7f / std::sqrt(s.moe_inter));
  Floats dense_act(T * s.inter), expert_act(size_t(T) * K * s.moe_inter), out(size_t(T) * 2 * H);
  cpu->ops().gate_up({dense_in.host.data(), expert_in.host.data(), gate.host.data(), up.host.data(),
                      expert_gate_up.host.data(), start.host.data(), assignment.host.data(),
                      dense_act.host.data(), expert_act.host.data()},
                     d, in.host(T, 1), *cpu);
  const auto run_gate_up = [&] {
    gpu->ops().gate_up({dense_in.device, expert_in.device, gate.device, up.device, expert_gate_up.device,
                        start.device, assignment.device, dense_act.device, expert_act.device},
                       d, in.device(T, 1), *gpu);
  };
  run_gate_up();
  compare("dense act", dense_act, bf), compare("expert act", expert_act, bf);
  again("dense act again", dense_act, run_gate_up), again("expert act again", expert_act, run_gate_up);
  // Some tokens apart: their own sorted list.
  const auto list_of = [&](int t, int n, Ints& own_start, Ints& own_assignment) {
    std::vector<std::pair<int, int>> chosen;
    for (int i = 0; i < n * K; i++) chosen.push_back({route_index.host[t * K + i], i});
    std::sort(chosen.begin(), chosen.end());
    for (int e = 0; e <= E; e++)
      own_start.host[e] =
          static_cast<int>(std::count_if(chosen.begin(), chosen.end(), [&](auto c) { return c.first < e; }));
    for (int i = 0; i < n * K; i++) own_assignment.host[i] = chosen[i].second;
    own_start.upload(), own_assignment.upload();
  };
  Ints own_start(E + 1), own_assignment(T * K);
  if (T > 1) {
    const auto dense_whole = dense_act.download(), expert_whole = expert_act.download();
    in_parts(T, cuda::grouped::takes(GateUpArgs{}, d, T), 9, [&](int t, int n) {
      dense_act.poison(), expert_act.poison();
      list_of(t, n, own_start, own_assignment);
      gpu->ops().gate_up({dense_in.device + t * H, expert_in.device + t * H, gate.device, up.device,
                          expert_gate_up.device, own_start.device, own_assignment.device,
                          dense_act.device + t * s.inter, expert_act.device + size_t(t) * K * s.moe_inter},
                         d, in.device(n, 1, t), *gpu);
      same_rows("dense act: tokens apart", dense_act, dense_whole, t, n, s.inter);
      same_rows("expert act: tokens apart", expert_act, expert_whole, t, n, size_t(K) * s.moe_inter);
    });
    dense_act.host = dense_whole, expert_act.host = expert_whole;
  }
  dense_act.upload(), expert_act.upload();
  cpu->ops().down({dense_act.host.data(), expert_act.host.data(), route_weight.host.data(), down.host.data(),
                   expert_down.host.data(), start.host.data(), assignment.host.data(), out.host.data()},
                  d, in.host(T, 1), *cpu);
  const auto run_down = [&] {
    gpu->ops().down({dense_act.device, expert_act.device, route_weight.device, down.device,
                     expert_down.device, start.device, assignment.device, out.device},
                    d, in.device(T, 1), *gpu);
  };
  run_down();
  compare("down", out, false);
  again("down again", out, run_down);
  const auto whole = out.download();
  if (T > 1) {
    in_parts(T, cuda::grouped::takes(DownArgs{}, d, T), 9, [&](int t, int n) {
      out.poison();
      list_of(t, n, own_start, own_assignment);
      gpu->ops().down({dense_act.device + t * s.inter, expert_act.device + size_t(t) * K * s.moe_inter,
                       route_weight.device + t * K, down.device, expert_down.device, own_start.device,
                       own_assignment.device, out.device + size_t(t) * 2 * H},
                      d, in.device(n, 1, t), *gpu);
      same_rows("down: tokens apart", out, whole, t, n, size_t(2) * H);
    });
  }
  for (int size = 2; size <= s.leaves; size *= 2) {
    const int pd = s.inter / size, pe = s.moe_inter / size;
    std::vector<std::vector<float>> sums;
    for (int rank = 0; rank < size; rank++) {
      Floats da(T * pd), ea(size_t(T) * K * pe), mine(size_t(T) * 2 * H);
      Weights wd(size_t(H) * pd), we(size_t(E) * H * pe);
      const auto part = [](auto& to, const auto& from, int total, int width, int r) {
        for (size_t i = 0; i < to.host.size(); i++)
          to.host[i] = from.host[i / width * total + r * width + i % width];
        to.upload();
      };
      part(da, dense_act, s.inter, pd, rank), part(ea, expert_act, s.moe_inter, pe, rank);
      part(wd, down, s.inter, pd, rank), part(we, expert_down, s.moe_inter, pe, rank);
      Dims mine_d = d;
      mine_d.leaves = s.leaves / size, mine_d.inter = pd, mine_d.moe_inter = pe;
      gpu->ops().down({da.device, ea.device, route_weight.device, wd.device, we.device, start.device,
                       assignment.device, mine.device},
                      mine_d, in.device(T, 1), *gpu);
      sums.push_back(mine.download());
    }
    for (size_t i = 0; i < whole.size(); i++) {
      float leaves[kMaxLeaves];
      for (int rank = 0; rank < size; rank++) leaves[rank] = sums[rank][i];
      sums[0][i] = tree_sum(leaves, size);
    }
    equal_bits("down: split over ranks", sums[0], whole);
  }
  // The layer's end.
  out.host = whole;
  Weights n1(H), n2(H), n3(H), scalar(1);
  fill(n1, 0.3f, 1), fill(n2, 0.3f, 1), fill(n3, 0.3f, 1), fill(scalar, 0.1f, 1);
  hidden.upload(), out.upload();
  cpu->ops().ffn_out({out.host.data(), n1.host.data(), n2.host.data(), n3.host.data(), scalar.host.data(),
                      hidden.host.data()},
                     d, in.host(T, 1), *cpu);
  gpu->ops().ffn_out({out.device, n1.device, n2.device, n3.device, scalar.device, hidden.device}, d,
                     in.device(T, 1), *gpu);
  compare("ffn_out", hidden, bf);
}

void test_head(const Shape& s, bool bf, int T, int candidates) {
  const int R = T, H = s.hidden, V = s.vocab, per_leaf = kSummaryFloats + kCandidateFloats * candidates;
  Dims d = dims_of(s, bf, candidates);
  Weights table(size_t(V) * H), norm(H);
  Floats hidden(T * H), normed(R * H), logits(size_t(R) * V), out(R * s.leaves * per_leaf), logprob(R),
      target(R);
  Ints token(R);
  fill(table, 0.02f), fill(norm, 5, 16);
  Step in(T, R);
  for (int t = 0; t < T; t++) {
    in.token.host[t] = static_cast<int>(random_bits() % V);
    in.position.host[t] = t + 3, in.slot.host[t] = t;
    in.row.host[t] = T - 1 - t, in.target.host[t] = t % 3 == 0 ? -1 : static_cast<int>(random_bits() % V);
    in.temperature.host[t] = t % 2 == 0 && candidates == 1 ? 0 : 0.8f;
    in.top_k.host[t] = candidates > 1 && candidates < V / s.leaves ? candidates : 0;
    in.top_p.host[t] = candidates > 1 && t % 2 ? 0.7f : 1;
    if (candidates >= V / s.leaves) in.top_p.host[t] = 0.9f;
    in.seed.host[t] = random_bits(), in.sequence.host[t] = t;
  }
  in.upload();
  cpu->ops().embed({table.host.data(), hidden.host.data(), 5.5f}, d, in.host(T, R), *cpu);
  gpu->ops().embed({table.device, hidden.device, 5.5f}, d, in.device(T, R), *gpu);
  equal_bits("embed", hidden.download(), hidden.host);
  cpu->ops().logits({hidden.host.data(), norm.host.data(), table.host.data(), normed.host.data(),
                     logits.host.data(), out.host.data()},
                    d, in.host(T, R), *cpu);
  gpu->ops().logits({hidden.device, norm.device, table.device, normed.device, logits.device, out.device}, d,
                    in.device(T, R), *gpu);
  compare("logits", logits, bf);
  const auto all_logits = logits.download();
  const auto all_candidates = out.download();
  // The halves of two ranks hold the same numbers.
  if (s.leaves > 1) {
    Dims half = d;
    half.size = 2, half.local_vocab = V / 2, half.leaves = s.leaves / 2;
    const size_t part = size_t(R) * half.leaves * per_leaf;
    for (half.rank = 0; half.rank < 2; half.rank++) {
      Floats mine(size_t(R) * V / 2), summary(part);
      gpu->ops().logits({hidden.device, norm.device, table.device + size_t(half.rank) * V / 2 * H,
                         normed.device, mine.device, summary.device},
                        half, in.device(T, R), *gpu);
      const auto l = mine.download(), c = summary.download();
      std::vector<float> expected_l, expected_c;
      for (int r = 0; r < R; r++) {
        const auto from = all_logits.begin() + size_t(r) * V + half.rank * (V / 2);
        expected_l.insert(expected_l.end(), from, from + V / 2);
        const auto summary_from =
            all_candidates.begin() + (size_t(r) * s.leaves + half.rank * half.leaves) * per_leaf;
        expected_c.insert(expected_c.end(), summary_from, summary_from + half.leaves * per_leaf);
      }
      equal_bits("logits: split over ranks", l, expected_l);
      equal_bits("candidates: split over ranks", c, expected_c);
    }
  }
  if (T > 1)
    in_parts(R, cuda::grouped::takes(LogitsArgs{}, d, R), 9, [&](int r, int n) {
      logits.poison();
      gpu->ops().logits({hidden.device, norm.device, table.device, normed.device,
                         logits.device + size_t(r) * V, out.device},
                        d, in.device(T, n, 0, r), *gpu);
      same_rows("logits: rows apart", logits, all_logits, r, n, V);
    });
  // The CPU summarises the GPU's logits? No: the GPU samples from the CPU's candidates, so both see the same.
  out.upload();
  cpu->ops().sample({out.host.data(), token.host.data(), logprob.host.data(), target.host.data()}, d,
                    in.host(T, R), *cpu);
  gpu->ops().sample({out.device, token.device, logprob.device, target.device}, d, in.device(T, R), *gpu);
  equal_bits("token", token.download(), token.host);
  equal_bits("logprob", logprob.download(), logprob.host);
  compare("target logprob", target, false);
  // And from its own candidates: the same tokens as long as the logits are not closer than their rounding.
  gpu->write(out.device, all_candidates.data(), all_candidates.size() * sizeof(float));
  gpu->ops().sample({out.device, token.device, logprob.device, target.device}, d, in.device(T, R), *gpu);
  const auto tokens = token.download();
  int other = 0;
  for (int r = 0; r < R; r++) other += tokens[r] != token.host[r];
  expect(other <= (bf ? R / 4 + 1 : 0), "token from own logits", other);
}

void test_synthetic() {
  where = "synthetic";
  for (const Stretch stretch :
       {Stretch{0, 5000, 0, 1}, Stretch{(uint64_t{1} << 32) - 700, 5000, 0, 1}, Stretch{77, 13, 40, 600}}) {
    const Synthetic source{{static_cast<uint32_t>(random_bits()), static_cast<uint32_t>(random_bits())},
                           to_float(to_bf16(3e-6f)),
                           to_float(to_bf16(0.02f))};
    Weights w(stretch.count * stretch.rows);
    cpu->ops().synthesize(source, stretch, w.host.data(), *cpu);
    gpu->ops().synthesize(source, stretch, w.device, *gpu);
    equal_bits("elements", w.download(), w.host);
  }
}

/// All ops with one shape, dtype and number of tokens. False: the device may be unusable.
bool check_shape(const Shape& s, bool bf, int T) {
  where = std::string(s.name) + (bf ? " bfloat16" : " float32") + " T=" + std::to_string(T);
  const int before = failures;
  try {
    test_attention_half(s, bf, T);
    test_ffn_half(s, bf, T);
    for (const int candidates : {1, 5, 1 << 20})
      if (T <= 13 || candidates == 1)
        test_head(s, bf, T, candidates > s.vocab / s.leaves ? s.vocab / s.leaves : candidates);
  } catch (const Error& error) {
    expect(false, error.what(), 0);
    std::printf("giving up: the device may be unusable\n");
    return false;
  }
  if (failures == before) std::printf("ok %s\n", where.c_str());
  std::fflush(stdout);
  return true;
}

}  // namespace

void check_all(bool small, bool many) {
  //           hidden heads kv dim window pairs inter moe experts top_k vocab leaves positions k=v
  const Shape shapes[] = {
      {"tiny", 64, 4, 2, 16, 8, 8, 16, 16, 8, 2, 256, 8, 40, false},
      {"tiny full", 64, 4, 1, 32, 0, 4, 32, 16, 8, 2, 128, 4, 600, true},
      {"odd", 72, 4, 4, 12, 16, 6, 24, 40, 12, 3, 264, 4, 50, false},
      {"odder", 100, 2, 2, 10, 0, 3, 28, 20, 5, 5, 202, 2, 300, false},
      {"middle", 256, 8, 4, 64, 32, 32, 512, 128, 32, 4, 2048, 8, 128, false},
      {"one leaf", 128, 3, 1, 32, 0, 16, 88, 24, 6, 2, 200, 1, 64, false},
      {"real sliding / 8 experts", 2816, 16, 8, 256, 1024, 128, 2112, 704, 16, 8, 4096, 8, 1500, false},
      {"real full / 8 experts", 2816, 16, 2, 512, 0, 64, 2112, 704, 12, 8, 4096, 8, 2000, true},
      {"grouped", 704, 8, 4, 64, 32, 32, 704, 704, 32, 4, 2048, 8, 400, false},
      {"many experts", 128, 4, 2, 32, 16, 16, 64, 32, 640, 6, 512, 8, 64, false},
  };
  if (!many) test_synthetic();
  for (const Shape& s : shapes)
    for (const bool bf : {true, false})
      for (const int T : {1, 2, 8, 13, 40, 300}) {
        const bool large = s.hidden > 1000;
        if (large && (T == 2 || small)) continue;
        if (T > 13 && (!bf || s.hidden < 700)) continue;
        if (many && (T < 13 || !bf || s.hidden < 700)) continue;
        if (!check_shape(s, bf, T)) return;
      }
  std::printf("worst distance bfloat16 %.2g, float32 %.2g\n", worst[1], worst[0]);
}

void check_quick() {
  struct Case {
    Shape shape;
    std::vector<int> bfloat16, float32;  // tokens
  };
  //           hidden heads kv dim window pairs inter moe experts top_k vocab leaves positions k=v
  const Case cases[] = {
      {{"tiny", 64, 4, 2, 16, 8, 8, 16, 16, 8, 2, 256, 8, 40, false}, {1, 8}, {2}},
      {{"tiny full", 64, 4, 1, 32, 0, 4, 32, 16, 8, 2, 128, 4, 300, true}, {2}, {1}},
      {{"odd", 72, 4, 4, 12, 16, 6, 24, 40, 12, 3, 264, 4, 50, false}, {3}, {1}},
      {{"odder", 100, 2, 2, 10, 0, 3, 28, 20, 5, 5, 202, 2, 200, false}, {2}, {2}},
      {{"one leaf", 128, 3, 1, 32, 0, 16, 88, 24, 6, 2, 200, 1, 64, false}, {13}, {}},
      {{"many experts", 64, 4, 2, 32, 16, 16, 16, 16, 200, 6, 128, 2, 64, false}, {2}, {}},
      {{"long rows", 4160, 1, 1, 16, 0, 4, 16, 16, 8, 2, 64, 1, 20, false}, {1}, {}},
      {{"grouped", 192, 4, 2, 64, 32, 32, 176, 176, 8, 3, 256, 2, 100, false}, {9, 70}, {}},
      {{"grouped leaves", 256, 8, 2, 64, 32, 32, 704, 704, 8, 3, 256, 8, 100, false}, {9, 40}, {}},
      {{"grouped half leaves", 128, 4, 2, 64, 32, 32, 352, 352, 8, 3, 256, 4, 100, false}, {9, 40}, {}},
      {{"grouped pieces", 64, 4, 2, 64, 32, 32, 528, 352, 8, 3, 256, 2, 100, false}, {9, 40, 70}, {}},
      {{"grouped heads", 64, 2, 1, 256, 24, 32, 88, 88, 8, 2, 64, 1, 150, false}, {66}, {}},
      {{"grouped full heads", 64, 2, 1, 512, 0, 32, 88, 88, 8, 2, 64, 1, 150, true}, {66}, {}},
  };
  test_synthetic();
  for (const Case& c : cases) {
    for (const int T : c.bfloat16)
      if (!check_shape(c.shape, true, T)) return;
    for (const int T : c.float32)
      if (!check_shape(c.shape, false, T)) return;
  }
  std::printf("worst distance bfloat16 %.2g, float32 %.2g\n", worst[1], worst[0]);
}

}  // namespace tp::test
