#include "ops/cuda/block.cuh"

namespace tp::cuda {

namespace {

__global__ void __launch_bounds__(kThreads) position_angles(AnglesArgs a, const int* position, int tokens) {
  wait_for_inputs();
  let_next_start();
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= tokens * a.pairs) return;
  const auto angle =
      static_cast<double>(a.frequency[i % a.pairs] * static_cast<float>(position[i / a.pairs]));
  double sine, cosine;
  sincos(angle, &sine, &cosine);
  a.cosine[i] = static_cast<float>(cosine);
  a.sine[i] = static_cast<float>(sine);
}

}  // namespace

void angles(const AnglesArgs& a, const Dims&, const Input& in, Backend& backend) {
  const int work = in.tokens * a.pairs;
  if (work == 0) return;
  of(backend).launch(position_angles, dim3(static_cast<unsigned>((work + kThreads - 1) / kThreads)), kThreads,
                     0, a, in.position, in.tokens);
}

}  // namespace tp::cuda
