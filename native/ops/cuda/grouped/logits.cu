#include "ops/cuda/grouped/parts.cuh"

namespace tp::cuda::grouped {

namespace {

template <class S>
void multiply_as(const LogitsArgs& a, const Dims& d, int rows, const Bf16* normed, CudaBackend& backend) {
  Parameters p{};
  p.part[0] = part_of<S, 64>(a.table, d.local_vocab, d.hidden, 1, rows, normed, a.logits, d.local_vocab);
  p.parts = 1;
  p.softcap = d.softcap;
  launch_grouped<S, 64, Finish::capped>(backend, p);
}

}  // namespace

void head(const LogitsArgs& a, const Dims& d, const Input& in, CudaBackend& backend) {
  Bf16* const normed = room_for(backend, int64_t{in.rows} * d.hidden);
  norm_rows(backend, a.hidden, in.row, a.norm, normed, in.rows, d.hidden, d.eps);
  if (in.rows <= kNarrow)
    multiply_as<Few64>(a, d, in.rows, normed, backend);
  else if (in.rows <= kFew)
    multiply_as<Wide64>(a, d, in.rows, normed, backend);
  else
    multiply_as<Many128>(a, d, in.rows, normed, backend);
}

}  // namespace tp::cuda::grouped
