// A block takes a token; its two branches lie in shared memory.
#include "ops/cuda/block.cuh"

namespace tp::cuda {

namespace {

__global__ void __launch_bounds__(kThreads) join_branches(FfnOutArgs a, int n, float eps, bool bfloat16) {
  extern __shared__ float dense[];
  __shared__ float room[2 * kWarps];
  float* const experts = dense + n;
  wait_for_inputs();
  let_next_start();
  const float* const sum = a.sum + static_cast<int64_t>(blockIdx.x) * 2 * n;
  float* const hidden = a.hidden + static_cast<int64_t>(blockIdx.x) * n;
  float both[2] = {0, 0};
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float x = dense[i] = round_to(bfloat16, sum[i]), y = experts[i] = round_to(bfloat16, sum[n + i]);
    both[0] = fused(x, x, both[0]);
    both[1] = fused(y, y, both[1]);
  }
  block_sums(both, room);
  const float of_dense = inverse_rms(both[0], n, eps), of_experts = inverse_rms(both[1], n, eps);
  float squares[1] = {0};
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float x = round_to(bfloat16, dense[i] * of_dense * to_float(a.dense_norm[i]));
    const float y = round_to(bfloat16, experts[i] * of_experts * to_float(a.expert_norm[i]));
    const float f = dense[i] = round_to(bfloat16, x + y);
    squares[0] = fused(f, f, squares[0]);
  }
  block_sums(squares, room);
  const float inverse = inverse_rms(squares[0], n, eps), scalar = to_float(*a.layer_scalar);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float f = round_to(bfloat16, dense[i] * inverse * to_float(a.norm[i]));
    hidden[i] = round_to(bfloat16, round_to(bfloat16, hidden[i] + f) * scalar);
  }
}

}  // namespace

void ffn_out(const FfnOutArgs& a, const Dims& d, const Input& in, Backend& backend) {
  of(backend).launch(join_branches, dim3(static_cast<unsigned>(in.tokens)), kThreads, 2 * d.hidden * sizeof(float), a, d.hidden,
                     d.eps, d.bfloat16);
}

}  // namespace tp::cuda
