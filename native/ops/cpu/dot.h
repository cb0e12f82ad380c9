// Dot products of weight rows with activations: the inner loop of every matrix op. Weights stream from memory
// once, so a tile takes R rows and M tokens; the order of each sum does not depend on the tile it is computed
// in.
#pragma once

#include "base/tree.h"
#include "ops/cpu/lanes.h"

namespace tp::TP_ISA {

/// acc[r][m] += weight row r . activation m over n elements, lane by lane.
/// weight: rows `stride` apart; x: one pointer per token. Ahead, unless 0: how many elements on will be read
/// soon though memory is not read in its order.
template <int R, int M, class Weight>
TP_INLINE void dot_tile(const Weight* weight, int64_t stride, const float* const* x, int n,
                        Lanes (&acc)[R][M], int64_t ahead = 0) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < R; r++) {
      const Lanes w = load(weight + r * stride + i);
      if (ahead > 0) __builtin_prefetch(weight + r * stride + ahead + i, 0, 2);
      for (int m = 0; m < M; m++) acc[r][m] = fused(w, load(x[m] + i), acc[r][m]);
    }
  }
  if (i == n) return;
  for (int r = 0; r < R; r++) {
    const Lanes w = load_tail(weight + r * stride + i, n - i);
    for (int m = 0; m < M; m++) acc[r][m] = fused(w, load_tail(x[m] + i, n - i), acc[r][m]);
  }
}

template <int R, int M>
TP_INLINE void clear(Lanes (&acc)[R][M]) {
  for (auto& row : acc)
    for (Lanes& lanes : row) lanes = zero();
}

/// Rows and tokens of one tile: two rows, half of all apart, x up to 3 tokens, whose 12 accumulators fill the
/// AVX2 registers. A sum alone would wait for each of its additions, and two long runs of memory are what the
/// prefetchers see. Calls tile(first row, how far apart its rows are, first token) with compile-time sizes as
/// template arguments.
template <class Tile>
TP_INLINE void for_tiles(int rows, int tokens, Tile&& tile) {
  const int half = rows / 2;
  for (int r = 0; r < half; r++) {
    int m = 0;
    for (; m + 3 <= tokens; m += 3) tile.template operator()<2, 3>(r, half, m);
    if (tokens - m == 2) tile.template operator()<2, 2>(r, half, m);
    if (tokens - m == 1) tile.template operator()<2, 1>(r, half, m);
  }
  if (rows % 2 == 0) return;
  for (int m = 0; m < tokens; m++) tile.template operator()<1, 1>(rows - 1, half, m);
}

/// out(row, token, weight[row] . x[token]) for `rows` rows of n elements, `stride` apart.
template <class Out>
TP_INLINE void mat_vec(const Bf16* weight, int64_t stride, int rows, const float* const* x, int tokens, int n,
                       Out&& out) {
  for_tiles(rows, tokens, [&]<int R, int M>(int row, int apart, int token) {
    Lanes acc[R][M];
    clear(acc);
    dot_tile(weight + row * stride, apart * stride, x + token, n, acc);
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) out(row + r * apart, token + m, sum(acc[r][m]));
  });
}

/// The same where the n elements of a row are `leaves` equal virtual shards: each summed on its own, then the
/// tree.
template <class Out>
TP_INLINE void mat_vec_leaves(const Bf16* weight, int64_t stride, int rows, const float* const* x, int tokens,
                              int n, int leaves, Out&& out) {
  const int leaf = n / leaves;
  // Rows a whole number of pages long take each other's places in the first-level cache.
  const int64_t ahead = tokens == 1 && stride * sizeof(Bf16) % 4096 == 0 ? stride : 0;
  for_tiles(rows, tokens, [&]<int R, int M>(int row, int apart, int token) {
    float sums[R][M][kMaxLeaves] = {};
    for (int l = 0; l < leaves; l++) {
      const float* shifted[M];
      for (int m = 0; m < M; m++) shifted[m] = x[token + m] + l * leaf;
      Lanes acc[R][M];
      clear(acc);
      dot_tile(weight + row * stride + l * leaf, apart * stride, shifted, leaf, acc, ahead);
      for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m][l] = sum(acc[r][m]);
    }
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) out(row + r * apart, token + m, tree_sum(sums[r][m], leaves));
  });
}

}  // namespace tp::TP_ISA
