// The one reduction order. Sums over a dimension that tensor parallelism splits have V leaves (virtual
// shards); they meet in a balanced binary tree of neighbours. A rank owns a complete subtree, so whoever adds
// the rest in the same order gets the same bits at any TP degree.
#pragma once

#include "base/math.h"

namespace tp {

constexpr int kMaxLeaves = 8;

/// Sum of `count` (a power of two) leaves `stride` apart, in tree order. Overwrites them.
TP_INLINE float tree_sum(float* leaves, int count, int stride = 1) {
  for (int span = 1; span < count; span *= 2)
    for (int i = 0; i < count; i += 2 * span) leaves[i * stride] += leaves[(i + span) * stride];
  return leaves[0];
}

/// Calls work.operator()<N>() for a count N of leaves, a power of two.
template <class Work>
void with_leaves(int count, Work&& work) {
  if (count == 8)
    work.template operator()<8>();
  else if (count == 4)
    work.template operator()<4>();
  else if (count == 2)
    work.template operator()<2>();
  else
    work.template operator()<1>();
}

/// Sum of exponentials of some logits, kept relative to their maximum: sum e^(x - max).
struct ExpSum {
  float max;
  float sum;
};

TP_INLINE ExpSum join(ExpSum a, ExpSum b) {
  const float max = a.max > b.max ? a.max : b.max;
  return {max, fused(a.sum, exp_f32(a.max - max), b.sum * exp_f32(b.max - max))};
}

/// log of the sum of exponentials over all leaves, in tree order. Overwrites them.
TP_INLINE float tree_log_sum_exp(ExpSum* leaves, int count) {
  for (int span = 1; span < count; span *= 2)
    for (int i = 0; i < count; i += 2 * span) leaves[i] = join(leaves[i], leaves[i + span]);
  return leaves[0].max + log_f32(leaves[0].sum);
}

}  // namespace tp
