#include "ops/cuda/block.cuh"

namespace tp::cuda {

namespace {

__global__ void __launch_bounds__(kThreads) embed_rows(EmbedArgs a, const int* token, int n, bool bfloat16) {
  wait_for_inputs();
  let_next_start();
  const Bf16* const row = a.table + static_cast<int64_t>(token[blockIdx.x]) * n;
  for (int i = threadIdx.x; i < n; i += kThreads)
    a.hidden[static_cast<int64_t>(blockIdx.x) * n + i] = round_to(bfloat16, to_float(row[i]) * a.scale);
}

}  // namespace

void embed(const EmbedArgs& a, const Dims& d, const Input& in, Backend& backend) {
  of(backend).launch(embed_rows, dim3(static_cast<unsigned>(in.tokens)), kThreads, 0, a, in.token, d.hidden,
                     d.bfloat16);
}

}  // namespace tp::cuda
