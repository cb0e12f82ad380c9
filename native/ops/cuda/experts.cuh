// The experts that a few tokens chose, each once, in the order of their ids.
#pragma once

#include "ops/cuda/gemv.cuh"

namespace tp::cuda {

/// One expert and, for every token of the columns, the slot (place among its K experts) of this expert, or
/// -1.
struct Chosen {
  int expert;
  signed char slot[kColumns];
};

inline __host__ __device__ int most_chosen(int experts, int top_k, int tokens) {
  return experts < top_k * tokens ? experts : top_k * tokens;
}
inline __host__ __device__ int chosen_bytes(int experts, int top_k, int tokens) {
  return (most_chosen(experts, top_k, tokens) * static_cast<int>(sizeof(Chosen)) + 15) / 16 * 16;
}

/// Fills `list` from the assignments sorted by expert; returns its length. All threads call it.
__device__ inline int choose_list(Chosen* list, const int* expert_start, const int* assignment, int experts,
                                  int top_k, const Columns& c) {
  __shared__ int counts[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int done = 0;
  for (int first = 0; first < experts; first += kThreads) {
    const int e = first + threadIdx.x;
    Chosen mine = {e, {-1, -1, -1, -1, -1, -1, -1, -1}};
    bool any = false;
    if (e < experts) {
      const int end = __ldcg(expert_start + e + 1);
      for (int i = __ldcg(expert_start + e); i < end; i++) {
        const int a = __ldcg(assignment + i), t = a / top_k - c.first;
        if (t < 0 || t >= c.tokens) continue;
        any = true;
#pragma unroll
        for (int column = 0; column < kColumns; column++)
          if (column == t) mine.slot[column] = static_cast<signed char>(a % top_k);
      }
    }
    const unsigned voters = __ballot_sync(~0u, any);
    if (lane == 0) counts[warp] = __popc(voters);
    __syncthreads();
    int at = done + __popc(voters & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; w++) {
      if (w < warp) at += counts[w];
      done += counts[w];
    }
    if (any) list[at] = mine;
    __syncthreads();
  }
  return done;
}

}  // namespace tp::cuda
