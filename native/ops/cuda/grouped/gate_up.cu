#include "ops/cuda/grouped/parts.cuh"

namespace tp::cuda::grouped {

namespace {

/// Gate rows, and the up rows that belong to them, of one matrix or of two.
template <class S>
Part gated(const Bf16* gate, const Bf16* up_rows, int rows, int matrix_rows, int high_row, int width,
           int columns, const Bf16* tokens, float* out) {
  Part p = part_of<S, 64>(gate, matrix_rows, width, 1, columns, tokens, out, rows);
  p.box = box_of(rows, S::kRows / 2);
  p.low = matrix_of(gate, matrix_rows, width, 64, p.box, true, true, 1).map;
  p.high = matrix_of(up_rows, matrix_rows, width, 64, p.box, true, true, 1).map;
  p.rows = rows;
  p.all_rows = 2 * rows;
  p.high_row = high_row;
  return p;
}

template <class S>
void multiply_as(const GateUpArgs& a, const Dims& d, int tokens, const Bf16* dense_in, const Bf16* expert_in,
                 CudaBackend& backend) {
  Parameters p{};
  if (d.inter > 0)
    p.part[p.parts++] = gated<S>(a.gate, a.up, d.inter, d.inter, 0, d.hidden, tokens, dense_in, a.dense_act);
  p.part[p.parts++] = gated<S>(a.expert_gate_up, a.expert_gate_up, d.moe_inter, d.experts * 2 * d.moe_inter,
                               d.moe_inter, d.hidden, 0, expert_in, a.expert_act);
  p.once = tokens <= kFew;  // a tile's columns nearly always hold all tokens of an expert
  p.experts = d.experts;
  p.expert_start = a.expert_start;
  p.assignment = a.assignment;
  p.token_of = divider(d.top_k);
  launch_grouped<S, 64, Finish::gated>(backend, p);
}

}  // namespace

void gate_up(const GateUpArgs& a, const Dims& d, const Input& in, CudaBackend& backend) {
  const int64_t count = int64_t{in.tokens} * d.hidden;
  Bf16* const dense_in = room_for(backend, 2 * count);
  Bf16* const expert_in = dense_in + count;
  // The router's lists are not done before this kernel's inputs are.
  round_rows(backend, Next::with_inputs, {a.dense_in, dense_in, count}, {a.expert_in, expert_in, count}, {});
  if (in.tokens <= kFew)
    multiply_as<Experts64>(a, d, in.tokens, dense_in, expert_in, backend);
  else
    multiply_as<Many128>(a, d, in.tokens, dense_in, expert_in, backend);
}

}  // namespace tp::cuda::grouped
