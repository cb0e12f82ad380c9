// A weight matrix as the copy engine sees it.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "base/dtype.h"

namespace tp::cuda {

struct Matrix {
  CUtensorMap map;  // rows and elements past the end read as zero
  const Bf16* data;
  int rows;
};

/// A matrix of rows of `width` elements, to be read in boxes of `box` rows by `chunk` elements. Swizzled:
/// piece p of 16 bytes of row r lies where piece p ^ r % 8 would. Without `aligned` the map stays empty and
/// readers take the elements one by one.
/// lines: cache lines (1 or 2) that memory gives at a time.
Matrix matrix_of(const Bf16* data, int64_t rows, int width, int chunk, int box, bool swizzled, bool aligned,
                 int lines = 2);

/// The same in boxes of every fourth row, `box` of them: coordinates are element, row % 4, row / 4. `rows` is
/// a multiple of 4.
CUtensorMap map_of_fourths(const Bf16* data, int64_t rows, int width, int chunk, int box, bool swizzled);

/// Rows of `pieces` pieces of `length` elements, in boxes of `chunk` elements of `box` rows of `together`
/// pieces, which lie piece after piece: coordinates are element of the piece, row, piece.
CUtensorMap map_of_pieces(const Bf16* data, int64_t rows, int length, int pieces, int chunk, int box,
                          int together);

}  // namespace tp::cuda
