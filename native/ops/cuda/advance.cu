#include "ops/cuda/block.cuh"

namespace tp::cuda {

namespace {

constexpr int kCounting = 1024;  // threads: the next step waits for them

// One block: a thread a row, and all of them count experts.
__global__ void __launch_bounds__(kCounting) end_step(AdvanceArgs a, int experts, int vocab, int rows) {
  __shared__ unsigned read[kCounting / 32];
  wait_for_inputs();
  let_next_start();
  const int thread = static_cast<int>(threadIdx.x);
  const uint64_t step = a.feed ? *a.steps : 0;
  const auto entry = static_cast<int>(step % static_cast<uint64_t>(a.depth));
  if (a.feed) {
    for (int r = thread; r < rows; r += kCounting) {
      a.history_token[entry * a.most_rows + r] = a.sampled[r];
      a.token[r] = a.sampled[r] < vocab ? a.sampled[r] : 0;
      a.history_logprob[entry * a.most_rows + r] = a.logprob[r];
      a.position[r]++;
    }
    if (thread == 0) a.history_ns[entry] = ptx::globaltimer();
  }
  unsigned count = 0;
#pragma unroll 4
  for (int i = thread; i < a.layers * experts; i += kCounting) {
    const int* const start = a.expert_start + static_cast<int64_t>(i / experts) * (experts + 1) + i % experts;
    count += start[1] > start[0];
  }
  count = __reduce_add_sync(~0u, count);
  if (thread % 32 == 0) read[thread / 32] = count;
  __threadfence_system();
  __syncthreads();
  if (thread >= 32) return;
  count = __reduce_add_sync(~0u, read[thread]);
  if (thread > 0) return;
  *a.experts_read += count;
  if (a.feed) *static_cast<volatile uint64_t*>(a.steps) = step + 1;
}

__global__ void write_time(uint64_t* ns) {
  let_next_start();  // the next op fetches its first weights as it would without this kernel
  wait_for_inputs();
  *ns = ptx::globaltimer();
}

}  // namespace

void note_time(uint64_t* ns, Backend& backend) { of(backend).launch(write_time, dim3(1), 1, 0, ns); }

void advance(const AdvanceArgs& a, const Dims& d, const Input& in, Backend& backend) {
  of(backend).launch(end_step, dim3(1), kCounting, 0, a, d.experts, d.vocab, in.rows);
}

}  // namespace tp::cuda
