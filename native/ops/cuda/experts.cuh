// The experts that a few tokens chose, each once, in the order of their ids.
#pragma once

#include "ops/cuda/gemv.cuh"

namespace tp::cuda {

/// One expert and, for every token of the columns, the slot (place among its K experts) of this expert, or
/// -1.
struct Chosen {
  unsigned long long slots;
  int expert;
  __device__ int slot(int token) const { return static_cast<signed char>(slots >> (8 * token)); }
};

inline __host__ __device__ int most_chosen(int experts, int top_k, int tokens) {
  return experts < top_k * tokens ? experts : top_k * tokens;
}
/// Room of a list, its length in front.
inline __host__ __device__ int chosen_bytes(int experts, int top_k, int tokens) {
  return 16 + (most_chosen(experts, top_k, tokens) * static_cast<int>(sizeof(Chosen)) + 15) / 16 * 16;
}

/// Fills `list` from the assignments sorted by expert, and `length`. kThreads threads call it.
/// all: assignments of the step, of which those of the columns' tokens count.
__device__ inline void choose_list(Chosen* list, int* length, const int* expert_start, const int* assignment,
                                   int all, int experts, Divider top_k, const Columns& c) {
  __shared__ int counts[kWarps];
  __shared__ int sorted[kColumns * 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool few = all <= kColumns * 32;  // then they come in the same trip as the starts
  if (few && static_cast<int>(threadIdx.x) < all) sorted[threadIdx.x] = __ldcg(assignment + threadIdx.x);
  int done = 0;
#pragma unroll 1
  for (int first = 0; first < experts; first += kThreads) {
    const int e = first + threadIdx.x;
    const int begin = e < experts ? __ldcg(expert_start + e) : 0,
              end = e < experts ? __ldcg(expert_start + e + 1) : 0;
    sync_block();
    unsigned long long slots = ~0ull;  // a byte a column
    bool any = false;
#pragma unroll 1
    for (int i = begin; i < end; i++) {
      const int a = few ? sorted[i] : __ldcg(assignment + i), token = top_k.of(a), t = token - c.first;
      if (t < 0 || t >= c.tokens) continue;
      any = true;
      slots ^= (0xffull ^ static_cast<unsigned long long>(a - token * static_cast<int>(top_k.divisor)))
               << (8 * t);
    }
    const unsigned voters = __ballot_sync(~0u, any);
    if (lane == 0) counts[warp] = __popc(voters);
    sync_block();
    int at = done + __popc(voters & ((1u << lane) - 1));
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      if (w < warp) at += counts[w];
      done += counts[w];
    }
    if (any) list[at] = {slots, e};
    if (threadIdx.x == 0) *length = done;
    sync_block();
  }
}

}  // namespace tp::cuda
