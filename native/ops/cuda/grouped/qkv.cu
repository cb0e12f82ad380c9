#include "ops/cuda/grouped/parts.cuh"

namespace tp::cuda::grouped {

namespace {

template <class S>
void project_as(const QkvArgs& a, const Dims& d, int tokens, const Bf16* normed, CudaBackend& backend) {
  const int q_rows = a.heads.heads * a.heads.head_dim, kv_rows = a.heads.kv_heads * a.heads.head_dim;
  Parameters p{};
  p.part[0] = part_of<S, 64>(a.q_weight, q_rows, d.hidden, 1, tokens, normed, a.q, q_rows);
  p.part[1] = part_of<S, 64>(a.k_weight, kv_rows, d.hidden, 1, tokens, normed, a.kv, 2 * kv_rows);
  p.parts = 2;
  if (a.v_weight)
    p.part[p.parts++] =
        part_of<S, 64>(a.v_weight, kv_rows, d.hidden, 1, tokens, normed, a.kv + kv_rows, 2 * kv_rows);
  launch_grouped<S, 64, Finish::rounded>(backend, p);
}

}  // namespace

void project(const QkvArgs& a, const Dims& d, const Input& in, CudaBackend& backend) {
  Bf16* const normed = room_for(backend, int64_t{in.tokens} * d.hidden);
  norm_rows(backend, a.hidden, nullptr, a.norm, normed, in.tokens, d.hidden, d.eps);
  if (in.tokens <= kNarrow)
    project_as<Few32>(a, d, in.tokens, normed, backend);
  else if (in.tokens <= kFew)
    project_as<Wide32>(a, d, in.tokens, normed, backend);
  else
    project_as<Many128>(a, d, in.tokens, normed, backend);
}

}  // namespace tp::cuda::grouped
