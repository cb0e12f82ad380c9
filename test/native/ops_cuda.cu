// Compares every CUDA op with its CPU twin and with itself (other batch, other TP degree, again), then times
// the ops and the whole step at the real shape. A program of its own, because it needs a GPU and no Node.
// ops_cuda [check | small] [time] [many]: exit code 1 when a comparison fails. many: steps of more than 8
// tokens.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/tree.h"
#include "ops/bench_moe.h"
#include "ops/cuda/cuda.h"
#include "ops/cuda/grouped/grouped.h"

using namespace tp;

namespace {

std::unique_ptr<Backend> cpu;
std::unique_ptr<cuda::CudaBackend> gpu;
uint32_t random_state = std::random_device{}();
uint32_t random_bits() { return mix32(random_state++); }
int failures = 0, comparisons = 0;

float uniform() { return static_cast<float>(random_bits() >> 8) * (2.0f / 16777216.0f) - 1.0f; }

/// The same values on both sides. Freed with its test.
template <class T>
struct Pair {
  std::vector<T> host;
  T* device = nullptr;
  explicit Pair(size_t count) : host(count) {
    cuda::check(cudaMalloc(&device, count * sizeof(T) + 16), "allocating");
    poison();
  }
  Pair(const Pair&) = delete;
  ~Pair() { cudaFree(device); }
  void poison() {
    std::memset(static_cast<void*>(host.data()), 0xff, host.size() * sizeof(T));
    upload();
  }
  void upload() { gpu->write(device, host.data(), host.size() * sizeof(T)); }
  std::vector<T> download() const {
    std::vector<T> out(host.size());
    gpu->read(out.data(), device, out.size() * sizeof(T));
    return out;
  }
};

using Floats = Pair<float>;
using Ints = Pair<int>;
using Weights = Pair<Bf16>;

void fill(Floats& to, float scale, bool bfloat16) {
  for (float& x : to.host) x = round_to(bfloat16, uniform() * scale);
  to.upload();
}
void fill(Weights& to, float scale, float offset = 0) {
  for (Bf16& x : to.host) x = to_bf16(offset + uniform() * scale);
  to.upload();
}

std::string where;  // what is being tested

void expect(bool good, const char* what, double value) {
  comparisons++;
  if (good) return;
  failures++;
  std::printf("FAIL %s: %s (%.3g)\n", where.c_str(), what, value);
}

/// |a - b| / |b| over all elements; infinite where one is NaN and the other is not.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 1e-30;
  for (size_t i = 0; i < a.size(); i++) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (!(std::abs(a[i]) < 1e30f) || !(std::abs(b[i]) < 1e30f)) {
      if (a[i] == b[i]) continue;
      return INFINITY;
    }
    difference += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
    size += double(b[i]) * b[i];
  }
  return std::sqrt(difference / size);
}

double worst[2] = {0, 0};

void compare(const char* what, const Floats& x, bool bfloat16) {
  const double d = distance(x.download(), x.host);
  worst[bfloat16] = std::max(worst[bfloat16], d);
  expect(d < (bfloat16 ? 4e-3 : 5e-6), what, d);
}

template <class T>
void equal_bits(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  size_t differ = 0;
  for (size_t i = 0; i < a.size(); i++) differ += std::memcmp(&a[i], &b[i], sizeof(T)) != 0;
  expect(a.size() == b.size() && differ == 0, what, static_cast<double>(differ));
}

struct Shape {
  const char* name;
  int hidden, heads, kv_heads, head_dim, window, rotary_pairs, inter, moe_inter, experts, top_k, vocab,
      leaves, positions;
  bool k_eq_v;
};

struct Step {  // input arrays
  Ints token, position, slot, row, target, top_k, sequence;
  Floats temperature, top_p;
  Pair<uint32_t> seed;
  Step(int t, int r)
      : token(t),
        position(t),
        slot(t),
        row(r),
        target(r),
        top_k(r),
        sequence(r),
        temperature(r),
        top_p(r),
        seed(r) {}
  void upload() {
    for (Ints* x : {&token, &position, &slot, &row, &target, &top_k, &sequence}) x->upload();
    temperature.upload(), top_p.upload(), seed.upload();
  }
  Input host(int t, int r) const {
    return {t,
            r,
            token.host.data(),
            position.host.data(),
            slot.host.data(),
            row.host.data(),
            target.host.data(),
            temperature.host.data(),
            top_k.host.data(),
            top_p.host.data(),
            seed.host.data(),
            sequence.host.data()};
  }
  /// Tokens [t0, t0 + t), rows [r0, r0 + r).
  Input device(int t, int r, int t0 = 0, int r0 = 0) const {
    return {t,
            r,
            token.device + t0,
            position.device + t0,
            slot.device + t0,
            row.device + r0,
            target.device + r0,
            temperature.device + r0,
            top_k.device + r0,
            top_p.device + r0,
            seed.device + r0,
            sequence.device + r0};
  }
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

/// Only what many tokens need, where `many` is asked for.
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
          return;
        }
        if (failures == before) std::printf("ok %s\n", where.c_str());
        std::fflush(stdout);
      }
  std::printf("%d comparisons, %d failures; worst distance bfloat16 %.2g, float32 %.2g\n", comparisons,
              failures, worst[1], worst[0]);
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr double kReachable = 4550;  // GB/s of a plain read kernel

/// Microseconds of `work`, recorded as a graph: the median of several replays of `inner` runs each.
double microseconds(const std::function<void()>& work, int inner, int repeats = 15) {
  work();
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cuda::check(cudaStreamBeginCapture(gpu->stream(), cudaStreamCaptureModeThreadLocal), "capture");
  work();
  cuda::check(cudaStreamEndCapture(gpu->stream(), &graph), "capture");
  cuda::check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  std::vector<float> times;
  for (int i = 0; i < repeats + 3; i++) {
    cudaEventRecord(start, gpu->stream());
    cuda::check(cudaGraphLaunch(exec, gpu->stream()), "launch");
    cudaEventRecord(stop, gpu->stream());
    cuda::check(cudaEventSynchronize(stop), "a timed run");
    float ms;
    cudaEventElapsedTime(&ms, start, stop);
    if (i >= 3) times.push_back(ms);
  }
  cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaEventDestroy(start), cudaEventDestroy(stop);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1000.0 / inner;
}

template <class T>
T* device(size_t count) {
  return static_cast<T*>(gpu->allocate(count * sizeof(T)));
}

uint32_t next_key = 1;
Bf16* synthetic(size_t count, double deviation, double offset = 0) {
  auto* const out = device<Bf16>(count);
  const Synthetic source{{next_key, next_key * 77 + 5},
                         to_float(to_bf16(static_cast<float>(deviation * std::sqrt(3.0) / 32767))),
                         to_float(to_bf16(static_cast<float>(offset)))};
  next_key++;
  gpu->ops().synthesize(source, {0, count, 0, 1}, out, *gpu);
  return out;
}

struct Layer {
  QkvArgs qkv;
  AttentionArgs attention;
  AttnOutArgs attn_out;
  RouteArgs route;
  GateUpArgs gate_up;
  DownArgs down;
  FfnOutArgs ffn_out;
  double qkv_bytes, out_bytes;
};

/// The real model's step, as rank 0 of `size`.
struct Model {
  Dims d{};
  std::vector<Layer> layers;
  EmbedArgs embed;
  LogitsArgs logits;
  SampleArgs sample;
  int max_tokens, size;

  Model(int ranks, int layer_count, int tokens, int positions, int slots) : max_tokens(tokens), size(ranks) {
    const int H = 2816, T = tokens;
    d.hidden = H, d.vocab = 262144, d.local_vocab = d.vocab / size, d.inter = 2112 / size,
    d.moe_inter = 704 / size, d.experts = 128;
    d.top_k = 8, d.all_leaves = 8, d.leaves = 8 / size, d.size = size, d.candidates = 1, d.eps = 1e-6f,
    d.softcap = 30, d.bfloat16 = true;
    auto* const hidden = device<float>(T * H);
    auto* const normed = device<float>(T * H);
    auto *const q = device<float>(T * 8192), *const kv = device<float>(T * 8192),
                *const attention = device<float>(T * 8192);
    auto *const attn_sum = device<float>(T * H), *const router_logits = device<float>(T * 128),
                *const dense_in = device<float>(T * H);
    auto *const expert_in = device<float>(T * H), *const route_weight = device<float>(T * 8);
    auto *const route_index = device<int>(T * 8), *const start = device<int>(129),
                *const assignment = device<int>(T * 8);
    auto *const dense_act = device<float>(T * 2112), *const expert_act = device<float>(T * 8 * 704),
                *const sum = device<float>(T * 2 * H);
    auto *const cosine = device<float>(T * 128), *const sine = device<float>(T * 128);
    const double rh = 1 / std::sqrt(double(H));
    for (int l = 0; l < layer_count; l++) {
      const bool full = l % 6 == 5;
      Heads h{16 / size, full ? std::max(1, 2 / size) : 8 / size, full ? 512 : 256, full ? 0 : 1024,
              full ? 64 : 128};
      const int q_rows = h.heads * h.head_dim, kv_rows = h.kv_heads * h.head_dim;
      const int capacity = full ? positions : std::min(1024 + T - 1, positions);
      const size_t cache = size_t(slots) * h.kv_heads * capacity * h.head_dim;
      const double qk = std::sqrt(3 / std::sqrt(double(h.head_dim)));
      Layer a{};
      const Cache c{synthetic(cache, 1), synthetic(cache, 1), capacity};
      a.qkv = {hidden,
               synthetic(H, 0.1, 1),
               synthetic(size_t(q_rows) * H, rh),
               synthetic(size_t(kv_rows) * H, rh),
               full ? nullptr : synthetic(size_t(kv_rows) * H, rh),
               synthetic(h.head_dim, 0.1 * qk, qk),
               synthetic(h.head_dim, 0.1 * qk, qk),
               cosine,
               sine,
               normed,
               q,
               kv,
               h,
               c};
      a.attention = {q, attention, h, c};
      a.attn_out = {attention, synthetic(size_t(H) * q_rows, 1 / std::sqrt(16.0 * h.head_dim)), attn_sum,
                    q_rows};
      a.route = {attn_sum,
                 hidden,
                 synthetic(H, 0.1, 1),
                 synthetic(H, 0.1, 1),
                 synthetic(H, 0.1, 1),
                 synthetic(H, 0.1 * std::sqrt(double(H)), std::sqrt(double(H))),
                 synthetic(size_t(128) * H, 1.5 * rh),
                 synthetic(128, 0.1, 1),
                 normed,
                 router_logits,
                 dense_in,
                 expert_in,
                 route_index,
                 route_weight,
                 start,
                 assignment};
      a.gate_up = {dense_in,
                   expert_in,
                   synthetic(size_t(d.inter) * H, rh),
                   synthetic(size_t(d.inter) * H, rh),
                   synthetic(size_t(128) * 2 * d.moe_inter * H, rh),
                   start,
                   assignment,
                   dense_act,
                   expert_act};
      a.down = {dense_act,
                expert_act,
                route_weight,
                synthetic(size_t(H) * d.inter, 1 / std::sqrt(2112.0)),
                synthetic(size_t(128) * H * d.moe_inter, 1 / std::sqrt(704.0)),
                start,
                assignment,
                sum};
      a.ffn_out = {
          sum,   synthetic(H, 0.1, 1), synthetic(H, 0.1, 1), synthetic(H, 0.1, 1), synthetic(1, 0.02, 1),
          hidden};
      a.qkv_bytes = 2.0 * H * (q_rows + (full ? 1 : 2) * kv_rows), a.out_bytes = 2.0 * H * q_rows;
      layers.push_back(a);
    }
    Bf16* const table = synthetic(size_t(d.vocab) * H, 0.1 * rh);
    embed = {table, hidden, 53.0f};
    auto* const candidates = device<float>(size_t(slots) * 8 * 6 * 2);
    logits = {hidden,    synthetic(H, 1, 16), table, normed, device<float>(size_t(slots) * d.local_vocab),
              candidates};
    sample = {candidates, device<int>(T), device<float>(T), device<float>(T)};
  }

  void layer(const Layer& l, const Input& in) const {
    const Ops& ops = gpu->ops();
    ops.qkv(l.qkv, d, in, *gpu);
    ops.attention(l.attention, d, in, *gpu);
    ops.attn_out(l.attn_out, d, in, *gpu);
    ops.route(l.route, d, in, *gpu);
    ops.gate_up(l.gate_up, d, in, *gpu);
    ops.down(l.down, d, in, *gpu);
    ops.ffn_out(l.ffn_out, d, in, *gpu);
  }
  int distinct(const Layer& l) const {
    std::vector<int> start(129);
    gpu->read(start.data(), l.route.expert_start, 129 * sizeof(int));
    int n = 0;
    for (int e = 0; e < 128; e++) n += start[e + 1] > start[e];
    return n;
  }
};

void report(const char* name, int size, int T, double us, double bytes) {
  std::printf("%-12s TP=%d T=%d  %9.2f us  %8.1f MB  %7.0f GB/s  %5.1f %%\n", name, size, T, us, bytes / 1e6,
              bytes / us / 1e3, bytes / us / 1e3 / kReachable * 100);
  std::fflush(stdout);
}

void time_all(int layer_count, const std::vector<int>& batches, const std::vector<int>& sizes) {
  const int most = batches.back();
  for (const int size : sizes) {
    gpu.reset();
    gpu = std::make_unique<cuda::CudaBackend>(0);
    const int positions = 1100;
    Model m(size, layer_count, most, positions, most);
    if (size == 1) {
      const void* memory = m.layers[0].gate_up.expert_gate_up;
      const uint64_t bytes = size_t(128) * 1408 * 2816 * 2;
      cudaEvent_t a, b;
      cudaEventCreate(&a), cudaEventCreate(&b);
      gpu->ops().stream(memory, bytes, *gpu);
      cudaEventRecord(a, gpu->stream());
      gpu->ops().stream(memory, bytes, *gpu);
      cudaEventRecord(b, gpu->stream());
      cudaEventSynchronize(b);
      float ms;
      cudaEventElapsedTime(&ms, a, b);
      std::printf("read kernel with its result fetched: %.0f GB/s\n", static_cast<double>(bytes) / ms / 1e6);
    }
    for (const int T : batches) {
      Step in(most, most);
      for (int t = 0; t < most; t++) {
        in.token.host[t] = static_cast<int>(random_bits() % 262144), in.position.host[t] = 100,
        in.slot.host[t] = t, in.row.host[t] = t;
        in.target.host[t] = -1, in.temperature.host[t] = 0, in.top_k.host[t] = 0, in.top_p.host[t] = 1,
        in.seed.host[t] = 1;
        in.sequence.host[t] = t;
      }
      in.upload();
      const Input input = in.device(T, T);
      const Ops& ops = gpu->ops();
      ops.embed(m.embed, m.d, input, *gpu);
      double expert_bytes = 0, fixed = 0, experts = 0;
      const double expert = 3.0 * 2 * 2816 * m.d.moe_inter, mlp = 3.0 * 2 * 2816 * m.d.inter;
      for (const Layer& l : m.layers) {
        m.layer(l, input);
        const int n = m.distinct(l);
        experts += n;
        expert_bytes += n * expert;
        fixed += l.qkv_bytes + l.out_bytes + mlp + 2.0 * 128 * 2816;
      }
      std::vector<float> hidden(T * 2816);
      gpu->read(hidden.data(), m.layers[0].qkv.hidden, hidden.size() * sizeof(float));
      double square = 0;
      for (const float x : hidden) square += double(x) * x;
      const double head_bytes = 2.0 * 2816 * m.d.local_vocab;
      std::printf("-- TP=%d T=%d: %.1f distinct experts a layer, hidden rms %.3f\n", size, T,
                  experts / m.layers.size(), std::sqrt(square / hidden.size()));
      // Ops one by one: 5 sliding layers in turn, so that no weights stay in the cache. Routing is the last
      // layer's.
      const double routed = m.distinct(m.layers.back());
      const auto each = [&](const char* name, double bytes, const std::function<void(const Layer&)>& op,
                            bool full = false) {
        std::vector<const Layer*> some;
        for (int l = 0; l < static_cast<int>(m.layers.size()); l++)
          if ((l % 6 == 5) == full && some.size() < 5) some.push_back(&m.layers[static_cast<size_t>(l)]);
        const double us = microseconds(
            [&] {
              for (int r = 0; r < 4; r++)
                for (const Layer* l : some) op(*l);
            },
            4 * static_cast<int>(some.size()));
        report(name, size, T, us, bytes);
      };
      each("qkv", m.layers[0].qkv_bytes, [&](const Layer& l) { ops.qkv(l.qkv, m.d, input, *gpu); });
      each(
          "qkv full", m.layers[5].qkv_bytes, [&](const Layer& l) { ops.qkv(l.qkv, m.d, input, *gpu); }, true);
      each("attention", 0, [&](const Layer& l) { ops.attention(l.attention, m.d, input, *gpu); });
      each("attn full", 0, [&](const Layer& l) { ops.attention(l.attention, m.d, input, *gpu); }, true);
      each("attn_out", m.layers[0].out_bytes,
           [&](const Layer& l) { ops.attn_out(l.attn_out, m.d, input, *gpu); });
      each(
          "out full", m.layers[5].out_bytes,
          [&](const Layer& l) { ops.attn_out(l.attn_out, m.d, input, *gpu); }, true);
      each("gate_up", mlp * 2 / 3 + routed * expert * 2 / 3,
           [&](const Layer& l) { ops.gate_up(l.gate_up, m.d, input, *gpu); });
      each("down", mlp / 3 + routed * expert / 3,
           [&](const Layer& l) { ops.down(l.down, m.d, input, *gpu); });
      each("moe pair", mlp + routed * expert, [&](const Layer& l) {
        ops.gate_up(l.gate_up, m.d, input, *gpu);
        ops.down(l.down, m.d, input, *gpu);
      });
      each("ffn_out", 0, [&](const Layer& l) { ops.ffn_out(l.ffn_out, m.d, input, *gpu); });
      each("route", 2.0 * 128 * 2816, [&](const Layer& l) { ops.route(l.route, m.d, input, *gpu); });
      report("logits", size, T, microseconds([&] { ops.logits(m.logits, m.d, input, *gpu); }, 1), head_bytes);
      if (size == 1)
        report("sample", size, T, microseconds([&] { ops.sample(m.sample, m.d, input, *gpu); }, 1), 0);
      const auto step = [&] {
        ops.embed(m.embed, m.d, input, *gpu);
        for (const Layer& l : m.layers) m.layer(l, input);
        ops.logits(m.logits, m.d, input, *gpu);
        if (size == 1) ops.sample(m.sample, m.d, input, *gpu);
      };
      for (const bool overlap : {true, false}) {
        gpu->overlap = overlap;
        report(overlap ? "STEP" : "step, no PDL", size, T, microseconds(step, 1, 31),
               fixed + expert_bytes + head_bytes);
      }
      gpu->overlap = true;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The fused step against the ops one by one, against itself stage by stage, and a token alone against all
// together.

Decoder decoder_of(const Model& m) {
  Decoder out;
  for (const Layer& l : m.layers)
    out.layers.push_back({l.qkv, l.attention, l.attn_out, l.route, l.gate_up, l.down, l.ffn_out});
  out.logits = m.logits;
  return out;
}

/// Positions and tokens of a step of T sequences.
void set_step(Step& in, const std::vector<int>& positions) {
  for (int t = 0; t < 8; t++) {
    in.token.host[t] = static_cast<int>(1000 + 17 * t), in.position.host[t] = positions[t % positions.size()],
    in.slot.host[t] = t, in.row.host[t] = t;
    in.target.host[t] = -1, in.temperature.host[t] = 0, in.top_k.host[t] = 0, in.top_p.host[t] = 1;
    in.seed.host[t] = 1, in.sequence.host[t] = t;
  }
  in.upload();
}

void set_angles(const Model& m) {
  std::vector<float> cosine(8 * 128), sine(8 * 128);
  for (size_t i = 0; i < cosine.size(); i++) {
    const float angle = 3 * uniform();
    cosine[i] = std::cos(angle), sine[i] = std::sin(angle);
  }
  gpu->write(const_cast<float*>(m.layers[0].qkv.cosine), cosine.data(), cosine.size() * sizeof(float));
  gpu->write(const_cast<float*>(m.layers[0].qkv.sine), sine.data(), sine.size() * sizeof(float));
}

std::vector<float> logits_of(const Model& m, int rows) {
  std::vector<float> out(static_cast<size_t>(rows) * m.d.local_vocab);
  gpu->read(out.data(), m.logits.logits, out.size() * sizeof(float));
  return out;
}

void test_fused(int layer_count) {
  const int positions = 1100, stages = layer_count * 7 + 1;
  Model m(1, layer_count, 8, positions, 8);
  set_angles(m);
  const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
  if (!fused) return expect(false, "the fused step does not take the real shape", 0);
  Step in(8, 8);
  const Ops& ops = gpu->ops();
  for (const std::vector<int>& at :
       std::vector<std::vector<int>>{{0}, {5, 63, 64, 100}, {1023, 1050, 700, 3}})
    for (const int T : {1, 2, 5, 8}) {
      where = "fused step at position " + std::to_string(at[0]) + " T=" + std::to_string(T);
      set_step(in, at);
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
      for (const int l : {0, 5}) {
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
            "attn_out", layer.attn_out.sum, 2816, [&] { ops.attn_out(layer.attn_out, m.d, input, *gpu); },
            [&] { fused->run(n + 2, n + 3, input); });
        compare(
            "route", layer.route.hidden, 2816, [&] { ops.route(layer.route, m.d, input, *gpu); },
            [&] {
              ops.embed(m.embed, m.d, input, *gpu);
              fused->run(n + 3, n + 4, input);
            });
        compare(
            "route weights", layer.route.route_weight, 8,
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
            "expert act", layer.gate_up.expert_act, 8 * m.d.moe_inter,
            [&] { ops.gate_up(layer.gate_up, m.d, input, *gpu); }, [&] { fused->run(n + 4, n + 5, input); });
        compare(
            "down", layer.down.sum, 2 * 2816, [&] { ops.down(layer.down, m.d, input, *gpu); },
            [&] { fused->run(n + 5, n + 6, input); });
        std::vector<float> kept(static_cast<size_t>(T) * 2816);
        gpu->read(kept.data(), layer.ffn_out.hidden, kept.size() * sizeof(float));
        compare(
            "ffn_out", layer.ffn_out.hidden, 2816, [&] { ops.ffn_out(layer.ffn_out, m.d, input, *gpu); },
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
      for (int again = 0; again < 3; again++) {
        ops.embed(m.embed, m.d, input, *gpu);
        fused->run(0, stages, input);
        expect(logits_of(m, T) == whole, "the same step again", again);
      }
      ops.embed(m.embed, m.d, input, *gpu);
      for (int s = 0; s < stages; s++) fused->run(s, s + 1, input);
      expect(logits_of(m, T) == whole, "stage by stage", 0);
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
  std::printf("%d comparisons, %d failures\n", comparisons, failures);
}

/// Stretches of a step against the same stages one by one: where does a stretch first leave other bits?
void test_stretches() {
  Model m(1, 6, 8, 1100, 8);
  set_angles(m);
  const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
  for (const int T : {1, 2, 8}) {
    Step in(8, 8);
    set_step(in, {0, 70});
    const Input input = in.device(T, T);
    const auto left = [&](int step) {  // what stage `step` leaves behind
      const Layer& l = m.layers[static_cast<size_t>(step / 7)];
      const float* const from[] = {l.qkv.q,         l.attention.attention, l.attn_out.sum,
                                   l.route.hidden,  l.gate_up.expert_act,  l.down.sum,
                                   l.ffn_out.hidden};
      const int width[] = {l.attn_out.columns, l.attn_out.columns, 2816, 2816,
                           8 * m.d.moe_inter,  2 * 2816,           2816};
      std::vector<float> out(static_cast<size_t>(T) * width[step % 7]);
      gpu->read(out.data(), from[step % 7], out.size() * sizeof(float));
      return out;
    };
    std::vector<std::vector<float>> alone;
    gpu->ops().embed(m.embed, m.d, input, *gpu);
    for (int s = 0; s < 14; s++) fused->run(s, s + 1, input), alone.push_back(left(s));
    for (int from = 0; from < 14; from++)
      for (int to = from + 1; to <= 14; to++) {
        int wrong = 0, most = 0;
        size_t first = 0;
        for (int again = 0; again < 4; again++) {
          gpu->ops().embed(m.embed, m.d, input, *gpu);
          for (int s = 0; s < from; s++) fused->run(s, s + 1, input);
          fused->run(from, to, input);
          const auto now = left(to - 1);
          int differ = 0;
          for (size_t i = 0; i < now.size(); i++)
            if (now[i] != alone[static_cast<size_t>(to - 1)][i]) {
              if (differ++ == 0) first = i;
            }
          wrong += differ > 0, most = std::max(most, differ);
        }
        if (wrong)
          std::printf("T=%d stages %d..%d: %d of 4 runs differ, %d elements, first %zu\n", T, from, to - 1,
                      wrong, most, first);
        expect(wrong == 0, "a stretch of stages against each alone", wrong);
        if (wrong) break;
      }
  }
  std::printf("%d comparisons, %d failures\n", comparisons, failures);
}

/// A few short steps, for a profiler.
void profile_fused() {
  Model m(2, 6, 8, 1100, 8);
  set_angles(m);
  const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
  Step in(8, 8);
  set_step(in, {100});
  for (int i = 0; i < 3; i++) fused->run(0, 6 * 7 + 1, in.device(1, 1));
  gpu->finish();
}

void time_fused(int layer_count) {
  const int stages = layer_count * 7 + 1;
  static const char* const kNames[] = {"qkv", "attention", "attn_out", "route", "gate_up", "down", "ffn_out"};
  for (const int size : {1, 2}) {
    gpu.reset();
    gpu = std::make_unique<cuda::CudaBackend>(0);
    Model m(size, layer_count, 8, 1100, 8);
    set_angles(m);
    // As one rank: what it would add to its peers' sums it adds to nothing.
    const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
    Step in(8, 8);
    for (const int T : {1, 2, 4, 8}) {
      set_step(in, {100});
      const Input input = in.device(T, T);
      gpu->ops().embed(m.embed, m.d, input, *gpu);
      fused->run(0, stages, input);
      double bytes = 2.0 * 2816 * m.d.local_vocab;
      for (const Layer& l : m.layers) {
        fused->run(0, 7, input);
        bytes += l.qkv_bytes + l.out_bytes + 2.0 * 128 * 2816 +
                 (m.d.inter + m.distinct(l) * static_cast<double>(m.d.moe_inter)) * 3.0 * 2 * 2816;
      }
      const double us = microseconds([&] { fused->run(0, stages, input); }, 1, 31);
      report("FUSED", size, T, us, bytes);
      const auto blocks = static_cast<size_t>(gpu->processors());
      auto* const marks = static_cast<uint64_t*>(gpu->allocate(blocks * stages * 4 * sizeof(uint64_t)));
      fused->measure(marks);
      for (int i = 0; i < 2; i++) fused->run(0, stages, input);
      fused->measure(nullptr);
      std::vector<uint64_t> seen(blocks * stages * 4);
      gpu->read(seen.data(), marks, seen.size() * sizeof(uint64_t));
      // Of every stage: from the first block's begin to the last block's, the inputs' and the end, and how
      // long blocks take from their inputs to their end: least, median, most. Medians over the layers, the
      // tenth layer on.
      for (const bool full : {false, true}) {
        std::printf(
            "%s layers: us until inputs (first, last block), later inputs, end (first, last); longest "
            "block\n",
            full ? "full" : "sliding");
        double layer_us = 0;
        for (int s = 0; s < 7; s++) {
          std::vector<double> out[7];
          for (int l = 1; l < layer_count; l++) {
            if ((l % 6 == 5) != full) continue;
            const auto at = [&](size_t block, int mark) {
              return seen[(block * stages + l * 7 + s) * 4 + mark];
            };
            uint64_t begin = ~0ull;
            double first[4] = {1e9, 1e9, 1e9, 1e9}, last[4] = {};
            for (size_t b = 0; b < blocks; b++) begin = std::min(begin, at(b, 0));
            for (size_t b = 0; b < blocks; b++)
              for (int i = 0; i < 4; i++) {
                if (at(b, i) < begin) continue;
                const double us = static_cast<double>(at(b, i) - begin) / 1e3;
                first[i] = std::min(first[i], us), last[i] = std::max(last[i], us);
              }
            const double numbers[7] = {last[0], first[1], last[1], first[2], last[2], first[3], last[3]};
            for (int i = 0; i < 7; i++) out[i].push_back(numbers[i]);
          }
          std::printf("  %-10s", kNames[s]);
          for (auto& x : out) {
            std::sort(x.begin(), x.end());
            std::printf(" %7.2f", x[x.size() / 2]);
          }
          std::printf("\n");
          layer_us += out[6][out[6].size() / 2];
        }
        std::vector<double> head;
        for (size_t b = 0; b < blocks; b++) {
          const uint64_t* const at = &seen[(b * stages + stages - 1) * 4];
          head.push_back(static_cast<double>(at[3] - at[0]) / 1e3);
        }
        std::sort(head.begin(), head.end());
        std::printf("  sum %.2f us; logits %.1f .. %.1f .. %.1f us\n", layer_us, head[0], head[blocks / 2],
                    head.back());
      }
    }
  }
}

/// Batches above 8, and a prompt of 2,048 tokens in one step.
void time_many(int layer_count) {
  time_all(layer_count, {16, 32, 64}, {2});
  constexpr int kPrompt = 2048;
  for (const int size : {2, 1}) {
    gpu.reset();
    gpu = std::make_unique<cuda::CudaBackend>(0);
    Model m(size, layer_count, kPrompt, kPrompt + 64, 1);
    Step in(kPrompt, 1);
    for (int t = 0; t < kPrompt; t++)
      in.token.host[t] = static_cast<int>(random_bits() % 262144), in.position.host[t] = t,
      in.slot.host[t] = 0;
    in.row.host[0] = kPrompt - 1, in.target.host[0] = -1, in.temperature.host[0] = 0, in.top_k.host[0] = 0;
    in.top_p.host[0] = 1, in.seed.host[0] = 1, in.sequence.host[0] = 0;
    in.upload();
    const Input input = in.device(kPrompt, 1);
    const Ops& ops = gpu->ops();
    ops.embed(m.embed, m.d, input, *gpu);
    for (const Layer& l : m.layers) m.layer(l, input);
    std::printf("-- TP=%d, a prompt of %d tokens\n", size, kPrompt);
    const auto each = [&](const char* name, double gflop, const std::function<void(const Layer&)>& op,
                          bool full = false) {
      std::vector<const Layer*> some;
      for (int l = 0; l < static_cast<int>(m.layers.size()); l++)
        if ((l % 6 == 5) == full && some.size() < 3) some.push_back(&m.layers[static_cast<size_t>(l)]);
      const double us = microseconds(
          [&] {
            for (const Layer* l : some) op(*l);
          },
          static_cast<int>(some.size()), 5);
      std::printf("%-12s TP=%d  %9.1f us  %7.1f TFLOP/s\n", name, size, us, gflop / us * 1e3);
      std::fflush(stdout);
    };
    const double matrix = 2.0 * kPrompt * 2816 * 1e-9;  // GFLOP for one weight row of H
    const auto run = [&](bool full) {
      const Layer& l = m.layers[full ? 5 : 0];
      const double columns = l.attn_out.columns;
      each(
          full ? "qkv full" : "qkv", l.qkv_bytes / 2 / 2816 * matrix,
          [&](const Layer& x) { ops.qkv(x.qkv, m.d, input, *gpu); }, full);
      // Of all scores half are seen, or a window of 1,024.
      const double pairs = full ? 0.5 * kPrompt * kPrompt : 1024.0 * (kPrompt - 512);
      each(
          full ? "attn full" : "attention", 4 * pairs * columns * 1e-9,
          [&](const Layer& x) { ops.attention(x.attention, m.d, input, *gpu); }, full);
      each(
          full ? "out full" : "attn_out", columns * matrix,
          [&](const Layer& x) { ops.attn_out(x.attn_out, m.d, input, *gpu); }, full);
    };
    run(false), run(true);
    each("route", 128 * matrix, [&](const Layer& x) { ops.route(x.route, m.d, input, *gpu); });
    const double wide = m.d.inter + 8.0 * m.d.moe_inter;
    each("gate_up", 2 * wide * matrix, [&](const Layer& x) { ops.gate_up(x.gate_up, m.d, input, *gpu); });
    each("down", wide * matrix, [&](const Layer& x) { ops.down(x.down, m.d, input, *gpu); });
    each("ffn_out", 0, [&](const Layer& x) { ops.ffn_out(x.ffn_out, m.d, input, *gpu); });
    const double us = microseconds(
        [&] {
          ops.embed(m.embed, m.d, input, *gpu);
          for (const Layer& l : m.layers) m.layer(l, input);
          ops.logits(m.logits, m.d, input, *gpu);
        },
        1, 5);
    std::printf("PROMPT       TP=%d  %9.1f us without all-reduces\n", size, us);
    std::fflush(stdout);
  }
}

/// The experts alone, by all variants.
void time_moe() {
  gpu.reset();
  for (const int width : {352, 704}) {
    std::vector<MoeCase> cases;
    for (const int T : {1, 2, 4, 8, 16, 32, 64})
      for (const char* variant : {"published", "grouped", "auto"}) cases.push_back({variant, T});
    MoeBench bench = bench_moe(0, {2816, width, 128, 8, width / 88}, cases, 30, 7);
    std::printf("-- experts of %d columns, read kernel %.0f GB/s\n", width, bench.read_gb_per_s);
    for (size_t i = 0; i < cases.size(); i++) {
      MoeTimes& x = bench.cases[i];
      std::sort(x.us.begin(), x.us.end());
      const double us = x.us[x.us.size() / 2];
      std::printf("moe N=%d T=%-2d %-9s %8.1f us  %5.0f GB/s  %5.2f x floor  distance %.1e\n", width,
                  cases[i].tokens, cases[i].variant.c_str(), us, x.bytes / us / 1e3,
                  us / (x.bytes / kReachable / 1e3), x.distance);
    }
  }
  gpu = std::make_unique<cuda::CudaBackend>(0);
}

/// A layer of 32 and one of 2,048 tokens, for a profiler.
void profile_many() {
  for (const int T : {32, 2048}) {
    gpu.reset();
    gpu = std::make_unique<cuda::CudaBackend>(0);
    Model m(2, 1, T, 2112, T > 64 ? 1 : T);
    Step in(T, 1);
    for (int t = 0; t < T; t++) {
      in.token.host[t] = static_cast<int>(random_bits() % 262144);
      in.position.host[t] = T > 64 ? t : 100, in.slot.host[t] = T > 64 ? 0 : t;
    }
    in.row.host[0] = 0;
    in.upload();
    const Input input = in.device(T, 1);
    gpu->ops().embed(m.embed, m.d, input, *gpu);
    m.layer(m.layers[0], input);
    gpu->finish();
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    cpu = make_cpu_backend("auto", 12);
    gpu = std::make_unique<cuda::CudaBackend>(0);
    const auto asked = [&](const char* what) {
      for (int i = 1; i < argc; i++)
        if (std::string(argv[i]) == what) return true;
      return argc == 1;
    };
    const bool many = argc > 1 && asked("many");
    if (asked("check") || asked("small")) check_all(asked("small") && argc > 1, many);
    if (argc > 1 && asked("profile")) profile_many();
    if (argc > 1 && asked("moe")) time_moe();
    if (asked("time")) {
      if (many)
        time_many(30);
      else
        time_all(30, {1, 2, 4, 8}, {1, 2});
    }
    if (asked("fused")) test_fused(6), test_stretches();
    if (asked("time") || asked("time-fused")) time_fused(30);
    if (argc > 1 && asked("profile-fused")) profile_fused();
  } catch (const Error& error) {
    std::printf("FAIL %s: %s\n", error.code().c_str(), error.what());
    return 1;
  }
  return failures > 0 ? 1 : 0;
}
