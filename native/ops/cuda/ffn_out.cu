// A block takes a token and keeps its rows in registers; the weights come before the inputs.
#include "ops/cuda/block.cuh"

namespace tp::cuda {

namespace {

template <int Per>
__global__ void __launch_bounds__(kThreads) join_branches(FfnOutArgs a, int n, float eps, bool bfloat16) {
  __shared__ float room[2 * kWarps];
  Row<Per> dense, experts, hidden, dense_norm, expert_norm, norm;
  dense_norm.load(a.dense_norm, n), expert_norm.load(a.expert_norm, n), norm.load(a.norm, n);
  const float scalar = to_float(*a.layer_scalar);
  wait_for_inputs();
  let_next_start();
  const float* const sum = a.sum + static_cast<int64_t>(blockIdx.x) * 2 * n;
  float* const out = a.hidden + static_cast<int64_t>(blockIdx.x) * n;
  dense.load(sum, n), experts.load(sum + n, n), hidden.load(out, n);
#pragma unroll
  for (int j = 0; j < Per; j++)
    dense.x[j] = round_to(bfloat16, dense.x[j]), experts.x[j] = round_to(bfloat16, experts.x[j]);
  float both[2] = {dense.squares(), experts.squares()};
  block_sums(both, room);
  const float of_dense = inverse_rms(both[0], n, eps), of_experts = inverse_rms(both[1], n, eps);
#pragma unroll
  for (int j = 0; j < Per; j++) {
    const float x = round_to(bfloat16, dense.x[j] * of_dense * dense_norm.x[j]);
    dense.x[j] = round_to(bfloat16, x + round_to(bfloat16, experts.x[j] * of_experts * expert_norm.x[j]));
  }
  float squares[1] = {dense.squares()};
  block_sums(squares, room);
  const float inverse = inverse_rms(squares[0], n, eps);
#pragma unroll
  for (int j = 0; j < Per; j++) {
    const float f = round_to(bfloat16, dense.x[j] * inverse * norm.x[j]);
    if (dense.index(j) < n)
      out[dense.index(j)] = round_to(bfloat16, round_to(bfloat16, hidden.x[j] + f) * scalar);
  }
}

}  // namespace

void ffn_out(const FfnOutArgs& a, const Dims& d, const Input& in, Backend& backend) {
  with_row(d.hidden, [&]<int Per>() {
    of(backend).launch(join_branches<Per>, dim3(static_cast<unsigned>(in.tokens)), kThreads, 0, a, d.hidden,
                       d.eps, d.bfloat16);
  });
}

}  // namespace tp::cuda
