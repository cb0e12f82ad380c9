// Final norm, this rank's rows of the vocabulary head, softcap; then what every vocabulary leaf tells the
// sampler.
#include "ops/cpu/candidates.h"
#include "ops/cpu/cpu.h"
#include "ops/cpu/norm.h"

namespace tp::TP_ISA {

namespace {

/// sum e^(logit - max): lane i % 16 takes element i, then the lanes' tree.
TP_INLINE float exp_sum(const float* logits, int n, float max) {
  Lanes acc = zero();
  for (int i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? n - i : kLanes;
    float e[kLanes] = {};
    if (count == kLanes)
      for (int l = 0; l < kLanes; l++) e[l] = exp_f32(logits[i + l] - max);
    else
      for (int l = 0; l < count; l++) e[l] = exp_f32(logits[i + l] - max);
    acc = add(acc, load(e));
  }
  return sum(acc);
}

/// One row of one leaf: tokens [first, first + n) of the vocabulary.
void summarise(const float* logits, int first, int n, int row, const Dims& d, const Input& in, float* out) {
  float max = logits[0];
  for (int i = 1; i < n; i++) max = logits[i] > max ? logits[i] : max;
  const int target = in.target[row] - first;
  const LeafSummary summary = {max, exp_sum(logits, n, max),
                               target >= 0 && target < n ? logits[target] : -__builtin_inff()};
  memcpy(out, &summary, sizeof summary);

  // Unfiltered sampling needs the best perturbed logit alone; filters need the best logits and perturb later.
  const float temperature = in.temperature[row];
  const bool perturb = temperature > 0 && in.top_k[row] == 0 && in.top_p[row] >= 1;
  const auto position = static_cast<uint32_t>(in.position[in.row[row]]);
  const auto heap = reinterpret_cast<Candidate*>(out + kSummaryFloats);
  for (int c = 0; c < d.candidates; c++) heap[c] = {-__builtin_inff(), -__builtin_inff(), kNoToken};
  for (int i = 0; i < n; i++) {
    Candidate seen = {logits[i], logits[i], static_cast<float>(first + i)};
    if (perturb)
      seen.score = logits[i] / temperature + gumbel(in.seed[row], static_cast<uint32_t>(in.sequence[row]),
                                                    position, static_cast<uint32_t>(first + i));
    if (!better(seen, heap[0])) continue;
    heap[0] = seen;
    sift_down(heap, 0, d.candidates);
  }
}

}  // namespace

void logits(const LogitsArgs& a, const Dims& d, const Input& in, Backend& backend) {
  for (int r = 0; r < in.rows; r++)
    rms_norm(a.hidden + static_cast<int64_t>(in.row[r]) * d.hidden, a.norm, d.hidden, d.eps, d.bfloat16,
             a.normed + static_cast<int64_t>(r) * d.hidden);
  if (in.rows == 0) return;
  const Blocks blocks(d.local_vocab, backend.threads());
  backend.parallel(blocks.count(), [&](int block, int thread) {
    const auto x = static_cast<const float**>(backend.scratch(thread, sizeof(float*) * in.rows));
    row_pointers(a.normed, in.rows, d.hidden, x);
    const int first = blocks.first(block);
    mat_vec(a.table + static_cast<int64_t>(first) * d.hidden, d.hidden, blocks.rows_of(block), x, in.rows,
            d.hidden, [&](int row, int r, float value) {
              a.logits[static_cast<int64_t>(r) * d.local_vocab + first + row] =
                  d.softcap > 0 ? d.softcap * tanh_f32(value / d.softcap) : value;
            });
  });
  const int leaf = d.local_vocab / d.leaves, stride = kSummaryFloats + kCandidateFloats * d.candidates;
  backend.parallel(in.rows * d.leaves, [&](int task, int) {
    const int row = task / d.leaves, l = task % d.leaves;
    summarise(a.logits + static_cast<int64_t>(row) * d.local_vocab + l * leaf,
              d.rank * d.local_vocab + l * leaf, leaf, row, d, in,
              a.candidates + static_cast<int64_t>(task) * stride);
  });
}

}  // namespace tp::TP_ISA
