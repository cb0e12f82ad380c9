#include <ctime>

#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

void note_time(uint64_t* ns, Backend&) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *ns = static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

void advance(const AdvanceArgs& a, const Dims& d, const Input& in, Backend& backend) {
  for (int l = 0; l < a.layers; l++) {
    const int* start = a.expert_start + static_cast<int64_t>(l) * (d.experts + 1);
    for (int e = 0; e < d.experts; e++) *a.experts_read += start[e + 1] > start[e];
  }
  if (!a.feed) return;
  const auto entry = static_cast<int>(*a.steps % static_cast<uint64_t>(a.depth));
  for (int r = 0; r < in.rows; r++) {
    a.history_token[entry * a.most_rows + r] = a.sampled[r];
    a.token[r] = a.sampled[r] < d.vocab ? a.sampled[r] : 0;
    a.history_logprob[entry * a.most_rows + r] = a.logprob[r];
    a.position[r]++;
  }
  note_time(a.history_ns + entry, backend);
  ++*a.steps;
}

}  // namespace tp::TP_ISA
