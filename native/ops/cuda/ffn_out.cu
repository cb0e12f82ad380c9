// A block takes a token and keeps its rows in registers; the weights come before the inputs.
#include "ops/cuda/block.cuh"

namespace tp::cuda {

namespace {

template <int Per, bool Aligned>
__global__ void __launch_bounds__(kThreads) join_branches(FfnOutArgs a, int n, float eps, bool bfloat16) {
  __shared__ float room[2 * kWarps];
  Row<Per, Aligned> dense, experts, hidden, dense_norm, expert_norm, norm;
  dense_norm.load(a.dense_norm, n), expert_norm.load(a.expert_norm, n), norm.load(a.norm, n);
  const float scalar = to_float(*a.layer_scalar);
  const auto r = [&](float x) { return round_to(bfloat16, x); };
  wait_for_inputs();
  let_next_start();
  const float* const sum = a.sum + static_cast<int64_t>(blockIdx.x) * 2 * n;
  float* const out = a.hidden + static_cast<int64_t>(blockIdx.x) * n;
  dense.load(sum, n), experts.load(sum + n, n), hidden.load(out, n);
  dense.change(r), experts.change(r);
  float both[2] = {dense.squares(), experts.squares()};
  block_sums(both, room);
  const float of_dense = inverse_rms(both[0], n, eps), of_experts = inverse_rms(both[1], n, eps);
  dense.change(
      [&](float d, float e, float dw, float ew) { return r(r(d * of_dense * dw) + r(e * of_experts * ew)); },
      experts, dense_norm, expert_norm);
  float squares[1] = {dense.squares()};
  block_sums(squares, room);
  const float inverse = inverse_rms(squares[0], n, eps);
  hidden.change([&](float m, float f, float w) { return r(r(m + r(f * inverse * w)) * scalar); }, dense,
                norm);
  hidden.store(out, n);
}

}  // namespace

void ffn_out(const FfnOutArgs& a, const Dims& d, const Input& in, Backend& backend) {
  with_row(d.hidden, [&]<int Per, bool Aligned>() {
    of(backend).launch(join_branches<Per, Aligned>, dim3(static_cast<unsigned>(in.tokens)), kThreads, 0, a,
                       d.hidden, d.eps, d.bfloat16);
  });
}

}  // namespace tp::cuda
