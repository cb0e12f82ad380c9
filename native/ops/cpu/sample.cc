// The next token from the gathered candidates; every rank computes the same from the same bytes.
#include "ops/cpu/candidates.h"
#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

namespace {

/// Keeps the top k, of those the shortest prefix with probability top_p, and draws: the best logit/T + noise.
Candidate draw(Candidate* list, int count, const Input& in, int row) {
  sort_best_first(list, count);
  const float temperature = in.temperature[row];
  if (in.top_k[row] > 0 && in.top_k[row] < count) count = in.top_k[row];
  if (in.top_p[row] < 1) {
    float total = 0, mass = 0;
    for (int i = 0; i < count; i++) total += exp_f32((list[i].logit - list[0].logit) / temperature);
    int kept = 0;
    while (kept < count && mass < in.top_p[row] * total)
      mass += exp_f32((list[kept++].logit - list[0].logit) / temperature);
    count = kept > 0 ? kept : 1;
  }
  const auto position = static_cast<uint32_t>(in.position[in.row[row]]);
  Candidate best = list[0];
  for (int i = 0; i < count; i++) {
    list[i].score =
        list[i].logit / temperature + gumbel(in.seed[row], static_cast<uint32_t>(in.sequence[row]), position,
                                             static_cast<uint32_t>(list[i].token));
    if (i == 0 || better(list[i], best)) best = list[i];
  }
  return best;
}

}  // namespace

void sample(const SampleArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const int stride = kSummaryFloats + kCandidateFloats * d.candidates;
  for (int row = 0; row < in.rows; row++) {
    ExpSum leaves[kMaxLeaves];
    float target = -__builtin_inff();
    const auto list =  // (V * C) real candidates of this row
        static_cast<Candidate*>(backend.scratch(0, sizeof(Candidate) * d.all_leaves * d.candidates));
    int count = 0;
    for (int l = 0; l < d.all_leaves; l++) {
      const int rank = l / d.leaves;
      const float* from =
          a.candidates + ((static_cast<int64_t>(rank) * in.rows + row) * d.leaves + l % d.leaves) * stride;
      LeafSummary summary;
      memcpy(&summary, from, sizeof summary);
      leaves[l] = {summary.max, summary.sum};
      target = summary.target > target ? summary.target : target;
      for (int c = 0; c < d.candidates; c++) {
        memcpy(list + count, from + kSummaryFloats + c * kCandidateFloats, sizeof(Candidate));
        if (list[count].token < static_cast<float>(d.vocab)) count++;
      }
    }
    const float log_sum = tree_log_sum_exp(leaves, d.all_leaves);
    const bool filtered = in.temperature[row] > 0 && (in.top_k[row] > 0 || in.top_p[row] < 1);
    Candidate best;
    if (filtered) {
      best = draw(list, count, in, row);
    } else {
      best = list[0];
      for (int c = 1; c < count; c++)
        if (better(list[c], best)) best = list[c];
    }
    a.token[row] = static_cast<int>(best.token);
    a.logprob[row] = best.logit - log_sum;
    a.target_logprob[row] = in.target[row] < 0 ? __builtin_nanf("") : target - log_sum;
  }
}

}  // namespace tp::TP_ISA
