
#include "ops/cuda/cuda.h"
#include "ops/cuda/matrix.h"

namespace tp::cuda {

namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// The driver's function, asked for at run time: the addon must load where there is no driver.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                           &result),
          "asking the driver for cuTensorMapEncodeTiled");
    if (!function) fail("TP_CUDA", "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

/// What a map says of one side of a matrix: elements, bytes from one to the next (of the first: of an
/// element), and how many a box has.
struct Side {
  int64_t size, stride;
  int box;
};

template <int Sides>
CUtensorMap map_of(const Bf16* data, const Side (&sides)[Sides], bool swizzled, int lines) {
  cuuint64_t sizes[Sides], strides[Sides];
  cuuint32_t box[Sides], steps[Sides];
  for (int i = 0; i < Sides; i++) {
    sizes[i] = static_cast<cuuint64_t>(sides[i].size), strides[i] = static_cast<cuuint64_t>(sides[i].stride);
    box[i] = static_cast<cuuint32_t>(sides[i].box), steps[i] = 1;
  }
  CUtensorMap map{};
  const CUresult status = encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, Sides, const_cast<Bf16*>(data), sizes, strides + 1, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      lines == 2 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    fail("TP_CUDA", "describing a matrix of %lld rows of %lld elements to the copy engine: error %d",
         static_cast<long long>(sides[Sides - 1].size), static_cast<long long>(sides[0].size),
         static_cast<int>(status));
  return map;
}

}  // namespace

Matrix matrix_of(const Bf16* data, int64_t rows, int width, int chunk, int box, bool swizzled, bool aligned,
                 int lines) {
  Matrix m{};
  m.data = data;
  m.rows = static_cast<int>(rows);
  if (aligned) m.map = map_of<2>(data, {{width, 2, chunk}, {rows, 2 * int64_t{width}, box}}, swizzled, lines);
  return m;
}

CUtensorMap map_of_fourths(const Bf16* data, int64_t rows, int width, int chunk, int box, bool swizzled) {
  const int64_t row = 2 * int64_t{width};
  return map_of<3>(data, {{width, 2, chunk}, {4, row, 1}, {rows / 4, 4 * row, box}}, swizzled, 2);
}

CUtensorMap map_of_pieces(const Bf16* data, int64_t rows, int length, int pieces, int chunk, int box,
                          int together) {
  const int64_t bytes = 2 * int64_t{length};
  return map_of<3>(data, {{length, 2, chunk}, {rows, pieces * bytes, box}, {pieces, bytes, together}}, false,
                   1);
}

}  // namespace tp::cuda
