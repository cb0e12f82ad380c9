// The end of a layer: a token's row and its norms are one block's work, the norm that the next layer or the
// head begins with included; of a token alone they are every block's.
#pragma once

#include "ops/cuda/resident/products.cuh"

namespace TP_RESIDENT {

__device__ __forceinline__ void ffn_out(Context& c, const LayerArgs& layer) {
  const FfnOutArgs& a = layer.ffn_out;
  constexpr int n = kRowLength;
  const float eps = c.p.dims.eps;
  if (c.alone() || c.owner()) {
    const int64_t t = c.row();
    const auto room = [&](int i) { return c.acts + i * stride_of(2 * n); };
    NormWeights::ask(room(1), a.dense_norm), NormWeights::ask(room(2), a.expert_norm);
    NormWeights::ask(room(3), a.norm);
    if (!c.last) NormWeights::ask(room(0), c.following_norm());
    const float scalar = to_float(*a.layer_scalar);
    Row hidden, sums[2];
    Row &dense = sums[0], &experts = sums[1];
    if (c.first)
      dense.load(a.sum + 2 * t * n, n), experts.load(a.sum + (2 * t + 1) * n, n);
    else
      reduced(sums, c.peers, c.sum_turn, 2 * t * n);
    c.mark(1);
    ptx::cp_async_wait_all();
    NormWeights dense_norm, expert_norm, norm, following;
    dense_norm.get(room(1)), expert_norm.get(room(2)), norm.get(room(3)), following.get(room(0));
    hidden.get(c.residual, n);  // until now the sums took the registers
    dense.change([](float x, int, int) { return rounded(x); });
    experts.change([](float x, int, int) { return rounded(x); });
    c.sums.next();
    c.sums.give(0, dense.squares()), c.sums.give(1, experts.squares());
    sync_consumers();
    const float of_dense = inverse_rms_of<kRowLength>(c.sums.take(0), eps),
                of_experts = inverse_rms_of<kRowLength>(c.sums.take(1), eps);
    dense.change([&](float x, int p, int j) {
      return rounded(rounded(x * of_dense * dense_norm.at(p, j)) +
                     rounded(experts.x[p][j] * of_experts * expert_norm.at(p, j)));
    });
    const float inverse = inverse_rms_of<kRowLength>(c.sums.over_block(dense.squares()), eps);
    hidden.change([&](float m, int p, int j) {
      return rounded(rounded(m + rounded(dense.x[p][j] * inverse * norm.at(p, j))) * scalar);
    });
    if (!c.last) {
      const float of_hidden = inverse_rms_of<kRowLength>(c.sums.over_block(hidden.squares()), eps);
      Row normed = hidden;
      normed.change([&](float x, int p, int j) { return x * of_hidden * following.at(p, j); });
      normed.put(c.alone() ? reinterpret_cast<Bf16*>(c.acts) : c.p.activations.normed + t * n, n);
    }
    if (!c.alone()) c.early.arrive();
    hidden.put(c.residual, n);
    if (c.owner()) hidden.store(a.hidden + t * n, n);  // for whatever follows the launch
  }
  if (!c.alone()) c.early.expect(c.tokens);
}

}  // namespace TP_RESIDENT
