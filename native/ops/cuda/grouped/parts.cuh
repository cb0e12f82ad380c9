// How an op describes its weight matrices to the grouped kernels.
#pragma once

#include "ops/cuda/grouped/grouped.cuh"
#include "ops/cuda/grouped/grouped.h"
#include "ops/cuda/grouped/rows.h"

namespace tp::cuda::grouped {

/// Rows that one copy brings: as many as fit a tile and divide all rows, so that no copy brings what belongs
/// to nobody.
inline int box_of(int rows, int tile) {
  int box = 8;
  while (2 * box <= tile && rows % (2 * box) == 0) box *= 2;
  return box;
}

/// How the kernels for S bring rows of a matrix that are not gated.
template <class S, int Chunk>
CUtensorMap map_of(const Bf16* weight, int64_t rows, int width, int box) {
  if (kIsDealt<S, Finish::sums>) return map_of_fourths(weight, rows, width, Chunk, S::kRows / 4, Chunk == 64);
  return matrix_of(weight, rows, width, Chunk, box, Chunk == 64, true, 1).map;
}

/// A matrix of `rows` rows of `width` elements, whose leaves are joined.
template <class S, int Chunk>
Part part_of(const Bf16* weight, int rows, int width, int leaves, int columns, const Bf16* tokens, float* out,
             int64_t out_stride) {
  Part p{};
  p.box = box_of(rows, S::kRows);
  p.low = map_of<S, Chunk>(weight, rows, width, p.box);
  p.tokens = tokens;
  p.token_box = least(S::kColumns, up(columns, 8));
  if (columns > 0)
    p.token_rows = matrix_of(tokens, columns, width, Chunk, p.token_box, Chunk == 64, true, 1).map;
  p.out = out;
  p.out_stride = out_stride;
  p.rows = p.all_rows = rows;
  p.width = width;
  p.leaves = leaves;
  p.chunks = width / leaves / Chunk;
  p.columns = columns;
  return p;
}

}  // namespace tp::cuda::grouped
