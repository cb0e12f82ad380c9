// Queries against their visible positions: scores, softmax, weighted sum of v. A task is a token's query
// heads that share keys, as many as leave work for every thread: a key and a value come from memory once for
// all of them. Each head's sums run from the first visible position to the last, so neither the batch nor the
// chunk, nor who shares a task, changes a bit.
#include <algorithm>
#include <type_traits>

#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

namespace {

// Of a task, and sums of its values that stay in registers while positions pass by.
#if defined(__AVX512F__)
constexpr int kMostHeads = 8, kMostSums = 16;
#else
constexpr int kMostHeads = 4, kMostSums = 4;
#endif
constexpr int kBlock = 32;  // positions whose values stay in the first-level cache

/// What the tasks of one token and KV head see.
template <class Element>
struct Sight {
  const Element *k, *v;  // (capacity, dim), a ring
  int capacity, dim, first, last;
  int visible() const { return last - first + 1; }
  /// each(position from the first visible one on, where it lies, how many lie behind it), up to `most` at
  /// once.
  template <class Each>
  void stretches(int most, Each&& each) const {
    for (int j = 0, n = 0; j < visible(); j += n) {
      const int at = (first + j) % capacity;
      n = std::min({visible() - j, capacity - at, most});
      each(j, at, n);
    }
  }
};

inline int padded(int dim) { return (dim + 4 * kLanes - 1) / (4 * kLanes) * (4 * kLanes); }

/// score[m][j] = q[m] . k[j]
template <int M, class Element>
void score_heads(const Sight<Element>& s, const float* const* q, float* score) {
  s.stretches(s.capacity, [&](int j, int at, int n) {
    const auto rows = [&]<int R>(int i) {
      Lanes acc[R][M];
      clear(acc);
      dot_tile(s.k + static_cast<int64_t>(at + i) * s.dim, s.dim, q, s.dim, acc);
      for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) score[m * s.visible() + j + i + r] = sum(acc[r][m]);
    };
    constexpr int kRows = kMostHeads / M;  // sums that do not wait for each other
    int i = 0;
    for (; i + kRows <= n; i += kRows) rows.template operator()<kRows>(i);
    for (; i < n; i++) rows.template operator()<1>(i);
  });
}

/// Scores become exp(score - maximum). The sum of them.
inline float weigh(float* score, int visible) {
  float max = -__builtin_inff();
  for (int j = 0; j < visible; j++) max = score[j] > max ? score[j] : max;
  for (int j = 0; j < visible; j++) score[j] = exp_f32(score[j] - max);
  Lanes sums = zero();
  int j = 0;
  for (; j + kLanes <= visible; j += kLanes) sums = add(sums, load(score + j));
  if (j < visible) sums = add(sums, load_tail(score + j, visible - j));
  return sum(sums);
}

/// value[m] = weights[m] . v; rows of padded(dim).
template <int M, class Element>
void sum_values(const Sight<Element>& s, const float* weight, float* value) {
  constexpr int kColumns = std::clamp(kMostSums / M, 1, 4);  // of kLanes
  const int pitch = padded(s.dim);
  std::fill(value, value + M * pitch, 0.0f);
  s.stretches(kBlock, [&](int j, int at, int n) {
    for (int c = 0; c < s.dim; c += kColumns * kLanes) {
      const int lanes = std::min(kColumns, (s.dim - c + kLanes - 1) / kLanes);
      Lanes acc[M][kColumns];
      for (int m = 0; m < M; m++)
        for (int l = 0; l < kColumns; l++) acc[m][l] = load(value + m * pitch + c + l * kLanes);
      for (int i = 0; i < n; i++) {
        const Element* const row = s.v + static_cast<int64_t>(at + i) * s.dim + c;
        Lanes w[M];
        for (int m = 0; m < M; m++) w[m] = broadcast(weight[m * s.visible() + j + i]);
        for (int l = 0; l < lanes; l++) {
          const int left = s.dim - c - l * kLanes;
          const Lanes x = left >= kLanes ? load(row + l * kLanes) : load_tail(row + l * kLanes, left);
          for (int m = 0; m < M; m++) acc[m][l] = fused(w[m], x, acc[m][l]);
        }
      }
      for (int m = 0; m < M; m++)
        for (int l = 0; l < kColumns; l++) store(value + m * pitch + c + l * kLanes, acc[m][l]);
    }
  });
}

/// `scratch`: M * (visible + padded(dim)) floats.
template <int M, class Element>
void attend(const Sight<Element>& s, const float* q, float* out, float* scratch) {
  float *const score = scratch, *const value = score + M * s.visible();
  const float* heads[M];
  for (int m = 0; m < M; m++) heads[m] = q + m * s.dim;
  score_heads<M>(s, heads, score);
  float total[M];
  for (int m = 0; m < M; m++) total[m] = weigh(score + m * s.visible(), s.visible());
  sum_values<M>(s, score, value);
  for (int m = 0; m < M; m++)
    for (int i = 0; i < s.dim; i++)
      out[m * s.dim + i] = round_to(std::is_same_v<Element, Bf16>, value[m * padded(s.dim) + i] / total[m]);
}

template <class Element>
void attend_all(const AttentionArgs& a, const Input& in, Backend& backend) {
  const Heads& h = a.heads;
  const int dim = h.head_dim, group = h.heads / h.kv_heads;
  int each = kMostHeads;
  while (group % each > 0 || (each > 1 && in.tokens * h.heads / each < backend.threads())) each /= 2;
  const int tasks = h.heads / each;  // of a token
  backend.parallel(in.tokens * tasks, [&](int task, int thread) {
    const int t = task / tasks, head = task % tasks * each, last = in.position[t];
    const int first = h.window > 0 && last >= h.window ? last - h.window + 1 : 0;
    const int64_t cache =
        (static_cast<int64_t>(in.slot[t]) * h.kv_heads + head / group) * a.cache.capacity * dim;
    const Sight<Element> sight{static_cast<const Element*>(a.cache.k) + cache,
                               static_cast<const Element*>(a.cache.v) + cache,
                               a.cache.capacity,
                               dim,
                               first,
                               last};
    const int floats = each * (sight.visible() + padded(dim));
    auto* const scratch =
        static_cast<float*>(backend.scratch(thread, sizeof(float) * static_cast<size_t>(floats)));
    const int64_t at = (static_cast<int64_t>(t) * h.heads + head) * dim;
    if (each == kMostHeads)
      attend<kMostHeads>(sight, a.q + at, a.attention + at, scratch);
    else if (each == 4)
      attend<4>(sight, a.q + at, a.attention + at, scratch);
    else if (each == 2)
      attend<2>(sight, a.q + at, a.attention + at, scratch);
    else
      attend<1>(sight, a.q + at, a.attention + at, scratch);
  });
}

}  // namespace

void attention(const AttentionArgs& a, const Dims& d, const Input& in, Backend& backend) {
  if (d.bfloat16)
    attend_all<Bf16>(a, in, backend);
  else
    attend_all<float>(a, in, backend);
}

}  // namespace tp::TP_ISA
