// Tokens that may be next, and their one order: higher score first, equal scores by the lower token id. A
// heap keeps its worst candidate on top; no library sort, whose order of equals might differ.
#pragma once

#include "ops/ops.h"

namespace tp::TP_ISA {

struct Candidate {
  float score, logit, token;
};
static_assert(sizeof(Candidate) == kCandidateFloats * sizeof(float));
static_assert(sizeof(LeafSummary) == kSummaryFloats * sizeof(float));

/// The token of an unused entry: no vocabulary is this large.
constexpr float kNoToken = 16777216.0f;

TP_INLINE bool better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

/// Moves entry i down until no child is worse than its parent.
TP_INLINE void sift_down(Candidate* heap, int i, int count) {
  for (;;) {
    int worst = i;
    for (int child = 2 * i + 1; child <= 2 * i + 2 && child < count; child++)
      if (better(heap[worst], heap[child])) worst = child;
    if (worst == i) return;
    const Candidate moved = heap[i];
    heap[i] = heap[worst];
    heap[worst] = moved;
    i = worst;
  }
}

/// Heap sort.
TP_INLINE void sort_best_first(Candidate* list, int count) {
  for (int i = count / 2 - 1; i >= 0; i--) sift_down(list, i, count);
  for (int n = count - 1; n > 0; n--) {
    const Candidate worst = list[0];
    list[0] = list[n];
    list[n] = worst;
    sift_down(list, 0, n);
  }
}

}  // namespace tp::TP_ISA
