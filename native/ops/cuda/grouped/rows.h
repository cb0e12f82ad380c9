// Activations as the grouped kernels take them: rows of bfloat16.
#pragma once

#include "ops/cuda/cuda.h"

namespace tp::cuda::grouped {

/// One buffer to round; its values are bfloat16-valued already.
struct Rows {
  const float* from;
  Bf16* to;
  int64_t count;  // elements, a multiple of 8
};
/// Where each assignment stands in the list sorted by expert; for down.
struct Places {
  const int* assignment;  // (T * K)
  int* place;             // (T * K) out; null: not wanted
  int count;
};

/// When the kernel that takes the rows may start, to bring weights until the rows are there. What that one
/// reads before it waits for them must have been done when the kernel before this one started.
enum class Next {
  at_once,
  with_inputs,  // when everything before this kernel is done
};

/// Room for `count` rounded elements of one op; the next op's reuse it.
Bf16* room_for(CudaBackend&, int64_t count);
void round_rows(CudaBackend&, Next, Rows first, Rows second, Places);
/// to[r] = norm(from[index[r]]) rounded; index null: row r. The next kernel starts at once.
void norm_rows(CudaBackend&, const float* from, const int* index, const Bf16* weight, Bf16* to, int rows,
               int width, float eps);

}  // namespace tp::cuda::grouped
