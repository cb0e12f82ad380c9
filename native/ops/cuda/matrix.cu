
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

}  // namespace

Matrix matrix_of(const Bf16* data, int64_t rows, int width, int chunk, int box, bool swizzled, bool aligned,
                 int lines) {
  Matrix m{};
  m.data = data;
  m.rows = static_cast<int>(rows);
  if (!aligned) return m;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(width) * sizeof(Bf16)};
  const cuuint32_t sides[2] = {static_cast<cuuint32_t>(chunk), static_cast<cuuint32_t>(box)},
                   steps[2] = {1, 1};
  const CUresult status = encoder()(
      &m.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<Bf16*>(data), sizes, stride, sides, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      lines == 2 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    fail("TP_CUDA", "describing a matrix of %lld rows of %d elements to the copy engine: error %d",
         static_cast<long long>(rows), width, static_cast<int>(status));
  return m;
}

CUtensorMap map_of_fourths(const Bf16* data, int64_t rows, int width, int chunk, int box, bool swizzled) {
  CUtensorMap map{};
  const auto row = static_cast<cuuint64_t>(width) * sizeof(Bf16);
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(width), 4, static_cast<cuuint64_t>(rows) / 4};
  const cuuint64_t strides[2] = {row, 4 * row};
  const cuuint32_t sides[3] = {static_cast<cuuint32_t>(chunk), 1, static_cast<cuuint32_t>(box)},
                   steps[3] = {1, 1, 1};
  const CUresult status = encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<Bf16*>(data), sizes,
                                    strides, sides, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    fail("TP_CUDA", "describing a matrix of %lld rows of %d elements to the copy engine: error %d",
         static_cast<long long>(rows), width, static_cast<int>(status));
  return map;
}

}  // namespace tp::cuda
