#include "ops/cuda/grouped/parts.cuh"

namespace tp::cuda::grouped {

namespace {

template <class S>
void multiply_as(const AttnOutArgs& a, const Dims& d, int tokens, const Bf16* attention,
                 CudaBackend& backend) {
  Parameters p{};
  p.part[0] = part_of<S, 64>(a.weight, d.hidden, a.columns, d.leaves, tokens, attention, a.sum, d.hidden);
  p.parts = 1;
  launch_grouped<S, 64, Finish::sums>(backend, p);
}

}  // namespace

void attn_out(const AttnOutArgs& a, const Dims& d, const Input& in, CudaBackend& backend) {
  const int64_t count = int64_t{in.tokens} * a.columns;
  Bf16* const attention = room_for(backend, count);
  round_rows(backend, Next::at_once, {a.attention, attention, count}, {}, {});
  if (in.tokens <= kNarrow)
    multiply_as<Leaves32>(a, d, in.tokens, attention, backend);
  else if (in.tokens <= kFew)
    multiply_as<Wide32>(a, d, in.tokens, attention, backend);
  else
    multiply_as<Many64>(a, d, in.tokens, attention, backend);
}

}  // namespace tp::cuda::grouped
