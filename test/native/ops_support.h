// What the checks and the timings of the CUDA ops share: both backends, buffers that exist on both sides, a
// step's input, comparisons, and the real model's step.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/tree.h"
#include "ops/cuda/cuda.h"

namespace tp::test {

inline std::unique_ptr<Backend> cpu;
inline std::unique_ptr<cuda::CudaBackend> gpu;
inline uint32_t random_state = std::random_device{}();
inline uint32_t random_bits() { return mix32(random_state++); }
inline int failures = 0, comparisons = 0;

inline float uniform() { return static_cast<float>(random_bits() >> 8) * (2.0f / 16777216.0f) - 1.0f; }

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

inline void fill(Floats& to, float scale, bool bfloat16) {
  for (float& x : to.host) x = round_to(bfloat16, uniform() * scale);
  to.upload();
}
inline void fill(Weights& to, float scale, float offset = 0) {
  for (Bf16& x : to.host) x = to_bf16(offset + uniform() * scale);
  to.upload();
}

inline std::string where;  // what is being tested

inline void expect(bool good, const char* what, double value) {
  comparisons++;
  if (good) return;
  failures++;
  std::printf("FAIL %s: %s (%.3g)\n", where.c_str(), what, value);
}

/// |a - b| / |b| over all elements; infinite where one is NaN and the other is not.
inline double distance(const std::vector<float>& a, const std::vector<float>& b) {
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

inline double worst[2] = {0, 0};

inline void compare(const char* what, const Floats& x, bool bfloat16) {
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

/// A model as the whole-step tests need it: the widths of the 26B shape, which the resident kernel is made
/// for.
struct ModelShape {
  int leaves, heads, kv_heads, kv_heads_full, experts, top_k, vocab, window;
  int period;  // the last of so many layers sees all positions
};
constexpr ModelShape kReal = {8, 16, 8, 2, 128, 8, 262144, 1024, 6};
constexpr int kHidden = 2816;

struct Layer : LayerArgs {
  double qkv_bytes, out_bytes;
};

/// A model's step, as rank `rank` of `size`. Ranks and sizes hold slices of the same weights.
struct Model {
  Backend& on;
  ModelShape shape;
  Dims d{};
  std::vector<Layer> layers;
  EmbedArgs embed;
  LogitsArgs logits;
  SampleArgs sample;
  int max_tokens, size;

  Model(int ranks, int layer_count, int tokens, int positions, int slots, const ModelShape& s = kReal,
        int rank = 0, Backend* backend = nullptr)
      : on(backend ? *backend : *gpu), shape(s), max_tokens(tokens), size(ranks) {
    const int H = kHidden, T = tokens, E = s.experts, K = s.top_k;
    const int inter = 264 * s.leaves, moe = 88 * s.leaves;
    d.hidden = H, d.vocab = s.vocab, d.local_vocab = s.vocab / size, d.inter = inter / size,
    d.moe_inter = moe / size, d.experts = E;
    d.top_k = K, d.all_leaves = s.leaves, d.leaves = s.leaves / size, d.rank = rank, d.size = size,
    d.candidates = 1, d.eps = 1e-6f, d.softcap = 30, d.bfloat16 = true;
    auto* const hidden = device<float>(T * H);
    auto* const normed = device<float>(T * H);
    auto *const q = device<float>(T * 8192), *const kv = device<float>(T * 8192),
                *const attention = device<float>(T * 8192);
    auto *const attn_sum = device<float>(T * H), *const router_logits = device<float>(T * E),
                *const dense_in = device<float>(T * H);
    auto *const expert_in = device<float>(T * H), *const route_weight = device<float>(T * K);
    auto *const route_index = device<int>(T * K), *const start = device<int>(E + 1),
                *const assignment = device<int>(T * K);
    auto *const dense_act = device<float>(T * inter), *const expert_act = device<float>(T * K * moe),
                *const sum = device<float>(T * 2 * H);
    auto *const cosine = device<float>(T * 128), *const sine = device<float>(T * 128);
    const double rh = 1 / std::sqrt(double(H));
    for (int l = 0; l < layer_count; l++) {
      const bool full = l % s.period == s.period - 1;
      const int all_kv = full ? s.kv_heads_full : s.kv_heads, D = full ? 512 : 256;
      Heads h{s.heads / size, std::max(1, all_kv / size), D, full ? 0 : s.window, full ? 64 : 128};
      // Ranks share a KV head where there are fewer heads than ranks.
      const int first_kv = rank * all_kv / size, q_rows = h.heads * D, kv_rows = h.kv_heads * D;
      const int capacity = full ? positions : std::min(s.window + T - 1, positions);
      const double qk = std::sqrt(3 / std::sqrt(double(D)));
      // Rows [first, first + rows) of a matrix of rows of H.
      const auto rows = [&](int first, int count, double deviation) {
        return synthetic({uint64_t(first) * H, uint64_t(count) * H, 0, 1}, deviation);
      };
      // This rank's share of the columns of `count` rows of `width`.
      const auto columns = [&](size_t count, int width, double deviation) {
        return synthetic({uint64_t(rank) * (width / size), uint64_t(width / size), uint64_t(width), count},
                         deviation);
      };
      const auto cache = [&] {
        const uint64_t of_head = uint64_t(capacity) * D;
        return synthetic({first_kv * of_head, h.kv_heads * of_head, all_kv * of_head, uint64_t(slots)}, 1);
      };
      Layer a{};
      Cache c{};
      c.k = cache(), c.v = cache(), c.capacity = capacity;
      a.qkv.hidden = hidden, a.qkv.norm = vector(H, 0.1, 1);
      a.qkv.q_weight = rows(rank * q_rows, q_rows, rh), a.qkv.k_weight = rows(first_kv * D, kv_rows, rh);
      a.qkv.v_weight = full ? nullptr : rows(first_kv * D, kv_rows, rh);
      a.qkv.q_norm = vector(D, 0.1 * qk, qk), a.qkv.k_norm = vector(D, 0.1 * qk, qk);
      a.qkv.cosine = cosine, a.qkv.sine = sine, a.qkv.normed = normed, a.qkv.q = q, a.qkv.kv = kv;
      a.qkv.heads = h, a.qkv.cache = c;
      a.attention = {q, attention, h, c};
      a.attn_out = {attention, columns(H, s.heads * D, 1 / std::sqrt(double(s.heads) * D)), attn_sum, q_rows};
      a.route.sum = attn_sum, a.route.hidden = hidden, a.route.post_norm = vector(H, 0.1, 1);
      a.route.dense_norm = vector(H, 0.1, 1), a.route.expert_norm = vector(H, 0.1, 1);
      a.route.scale = vector(H, 0.1 * std::sqrt(double(H)), std::sqrt(double(H)));
      a.route.router = rows(0, E, 1.5 * rh), a.route.per_expert_scale = vector(E, 0.1, 1);
      a.route.normed = normed, a.route.router_logits = router_logits, a.route.dense_in = dense_in;
      a.route.expert_in = expert_in, a.route.route_index = route_index, a.route.route_weight = route_weight;
      a.route.expert_start = start, a.route.assignment = assignment;
      a.gate_up.dense_in = dense_in, a.gate_up.expert_in = expert_in;
      a.gate_up.gate = rows(rank * d.inter, d.inter, rh), a.gate_up.up = rows(rank * d.inter, d.inter, rh);
      // Of every expert the gate rows, then the up rows.
      a.gate_up.expert_gate_up = synthetic(
          {uint64_t(rank) * d.moe_inter * H, uint64_t(d.moe_inter) * H, uint64_t(moe) * H, uint64_t(E) * 2},
          rh);
      a.gate_up.expert_start = start, a.gate_up.assignment = assignment;
      a.gate_up.dense_act = dense_act, a.gate_up.expert_act = expert_act;
      a.down = {dense_act,
                expert_act,
                route_weight,
                columns(H, inter, 1 / std::sqrt(double(inter))),
                columns(size_t(E) * H, moe, 1 / std::sqrt(double(moe))),
                start,
                assignment,
                sum};
      a.ffn_out.sum = sum, a.ffn_out.dense_norm = vector(H, 0.1, 1);
      a.ffn_out.expert_norm = vector(H, 0.1, 1), a.ffn_out.norm = vector(H, 0.1, 1);
      a.ffn_out.layer_scalar = vector(1, 0.02, 1), a.ffn_out.hidden = hidden;
      a.qkv_bytes = 2.0 * H * (q_rows + (full ? 1 : 2) * kv_rows), a.out_bytes = 2.0 * H * q_rows;
      layers.push_back(a);
    }
    Bf16* const table = vector(size_t(d.vocab) * H, 0.1 * rh);
    embed = {table, hidden, 53.0f};
    auto* const candidates = device<float>(size_t(slots) * d.leaves * 6 * 2);
    logits.hidden = hidden, logits.norm = vector(H, 1, 16);
    logits.table = table + size_t(rank) * d.local_vocab * H, logits.normed = normed;
    logits.logits = device<float>(size_t(slots) * d.local_vocab), logits.candidates = candidates;
    sample = {candidates, device<int>(T), device<float>(T), device<float>(T)};
  }

  void layer(const Layer& l, const Input& in) const {
    const Ops& ops = on.ops();
    ops.qkv(l.qkv, d, in, on);
    ops.attention(l.attention, d, in, on);
    ops.attn_out(l.attn_out, d, in, on);
    ops.route(l.route, d, in, on);
    ops.gate_up(l.gate_up, d, in, on);
    ops.down(l.down, d, in, on);
    ops.ffn_out(l.ffn_out, d, in, on);
  }
  int distinct(const Layer& l) const {
    std::vector<int> start(static_cast<size_t>(d.experts) + 1);
    on.read(start.data(), l.route.expert_start, start.size() * sizeof(int));
    int n = 0;
    for (int e = 0; e < d.experts; e++) n += start[e + 1] > start[e];
    return n;
  }

 private:
  uint32_t next_key_ = 1;

  template <class T>
  T* device(size_t count) {
    return static_cast<T*>(on.allocate(count * sizeof(T)));
  }
  /// A slice of the model's next tensor.
  Bf16* synthetic(const Stretch& slice, double deviation, double offset = 0) {
    auto* const out = device<Bf16>(slice.count * slice.rows);
    const Synthetic source{{next_key_, next_key_ * 77 + 5},
                           to_float(to_bf16(static_cast<float>(deviation * std::sqrt(3.0) / 32767))),
                           to_float(to_bf16(static_cast<float>(offset)))};
    next_key_++;
    on.ops().synthesize(source, slice, out, on);
    return out;
  }
  Bf16* vector(size_t count, double deviation, double offset = 0) {
    return synthetic({0, count, 0, 1}, deviation, offset);
  }
};

inline Decoder decoder_of(const Model& m) {
  Decoder out;
  out.layers.assign(m.layers.begin(), m.layers.end());
  out.logits = m.logits;
  return out;
}

/// Positions and tokens of a step. A token at the position behind the one before it is of the same sequence.
inline void set_step(Step& in, const std::vector<int>& positions, int vocab = kReal.vocab) {
  for (int t = 0; t < static_cast<int>(in.token.host.size()); t++) {
    in.token.host[t] = (1000 + 17 * t) % vocab, in.position.host[t] = positions[t % positions.size()];
    const bool follows = t > 0 && in.position.host[t] == in.position.host[t - 1] + 1;
    in.slot.host[t] = follows ? in.slot.host[t - 1] : t, in.row.host[t] = t;
    in.target.host[t] = -1, in.temperature.host[t] = 0, in.top_k.host[t] = 0, in.top_p.host[t] = 1;
    in.seed.host[t] = 1, in.sequence.host[t] = t;
  }
  in.upload();
}

/// Angles (T, 128) of no particular positions.
inline void set_angles(const Model& m) {
  const size_t count = static_cast<size_t>(m.max_tokens) * 128;
  std::vector<float> cosine(count), sine(count);
  for (size_t i = 0; i < count; i++) {
    const float angle = 0.37f * static_cast<float>(i % 1009);
    cosine[i] = std::cos(angle), sine[i] = std::sin(angle);
  }
  m.on.write(const_cast<float*>(m.layers[0].qkv.cosine), cosine.data(), count * sizeof(float));
  m.on.write(const_cast<float*>(m.layers[0].qkv.sine), sine.data(), count * sizeof(float));
}

inline std::vector<float> logits_of(const Model& m, int rows) {
  std::vector<float> out(static_cast<size_t>(rows) * m.d.local_vocab);
  m.on.read(out.data(), m.logits.logits, out.size() * sizeof(float));
  return out;
}

}  // namespace tp::test
