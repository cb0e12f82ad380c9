#include "ops/cuda/block.cuh"

namespace tp::cuda {

namespace {

// One block: a thread a row, and all of them count experts.
__global__ void __launch_bounds__(kThreads) end_step(AdvanceArgs a, int experts, int vocab, int rows) {
  __shared__ float room[kWarps];
  wait_for_inputs();
  let_next_start();
  float counts[1] = {0};  // whole numbers, exact
  for (int i = threadIdx.x; i < a.layers * experts; i += kThreads) {
    const int* const start = a.expert_start + static_cast<int64_t>(i / experts) * (experts + 1) + i % experts;
    counts[0] += start[1] > start[0] ? 1.0f : 0.0f;
  }
  block_sums(counts, room);
  if (threadIdx.x == 0) *a.experts_read += static_cast<uint64_t>(counts[0]);
  if (!a.feed) return;
  const uint64_t step = *a.steps;
  const auto entry = static_cast<int>(step % static_cast<uint64_t>(a.depth));
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    a.history_token[entry * a.most_rows + r] = a.sampled[r];
    a.token[r] = a.sampled[r] < vocab ? a.sampled[r] : 0;
    a.history_logprob[entry * a.most_rows + r] = a.logprob[r];
    a.position[r]++;
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x > 0) return;
  a.history_ns[entry] = ptx::globaltimer();
  __threadfence_system();
  *static_cast<volatile uint64_t*>(a.steps) = step + 1;
}

__global__ void write_time(uint64_t* ns) {
  let_next_start();  // the next op fetches its first weights as it would without this kernel
  wait_for_inputs();
  *ns = ptx::globaltimer();
}

}  // namespace

void note_time(uint64_t* ns, Backend& backend) { of(backend).launch(write_time, dim3(1), 1, 0, ns); }

void advance(const AdvanceArgs& a, const Dims& d, const Input& in, Backend& backend) {
  of(backend).launch(end_step, dim3(1), kThreads, 0, a, d.experts, d.vocab, in.rows);
}

}  // namespace tp::cuda
