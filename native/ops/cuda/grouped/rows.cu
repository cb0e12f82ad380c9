#include "ops/cuda/gemv.cuh"
#include "ops/cuda/grouped/rows.h"

namespace tp::cuda::grouped {

namespace {

constexpr int kRoundThreads = 256;

__global__ void __launch_bounds__(kRoundThreads)
    round_all(const __grid_constant__ Rows first, const __grid_constant__ Rows second,
              const __grid_constant__ Places places, Next next) {
  if (next == Next::at_once) let_next_start();
  wait_for_inputs();
  let_next_start();
  const int64_t thread = blockIdx.x * int64_t{kRoundThreads} + threadIdx.x,
                threads = gridDim.x * int64_t{kRoundThreads};
  const int64_t pieces = first.count / 8, all = pieces + second.count / 8;
#pragma unroll 2
  for (int64_t i = thread; i < all; i += threads) {
    const bool one = i < pieces;
    const int64_t at = one ? i : i - pieces;
    float x[8];
    eight((one ? first.from : second.from) + at * 8, x);
    reinterpret_cast<uint4*>(one ? first.to : second.to)[at] = pack(x);
  }
  if (!places.place) return;
  for (int64_t i = thread; i < places.count; i += threads)
    places.place[places.assignment[i]] = static_cast<int>(i);
}

template <int Per, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    norm_all(const float* from, const int* index, const Bf16* weight, Bf16* to, int width, float eps) {
  __shared__ float room[kWarps];
  let_next_start();
  Row<Per, Aligned> row, w;
  w.load(weight, width);
  wait_for_inputs();
  const int r = blockIdx.x;
  row.load(from + static_cast<int64_t>(index ? index[r] : r) * width, width);
  float squares[1] = {row.squares()};
  block_sums(squares, room);
  const float inverse = inverse_rms(squares[0], width, eps);
  row.change([&](float x, float y) { return x * inverse * y; }, w);
#pragma unroll
  for (int p = 0; p < Per; p++)
    if (row.element(p) < width)
      *reinterpret_cast<uint4*>(to + static_cast<int64_t>(r) * width + row.element(p)) = pack(row.x[p]);
}

}  // namespace

Bf16* room_for(CudaBackend& backend, int64_t count) {
  return static_cast<Bf16*>(
      backend.workspace("rounded activations", static_cast<size_t>(count) * sizeof(Bf16)));
}

void round_rows(CudaBackend& backend, Next next, Rows first, Rows second, Places places) {
  const int64_t blocks = ((first.count + second.count) / 8 + kRoundThreads - 1) / kRoundThreads;
  const int64_t most = int64_t{8} * backend.processors();
  backend.launch(round_all, dim3(static_cast<unsigned>(blocks < most ? blocks : most)), kRoundThreads, 0,
                 first, second, places, next);
}

void norm_rows(CudaBackend& backend, const float* from, const int* index, const Bf16* weight, Bf16* to,
               int rows, int width, float eps) {
  with_row(width, [&]<int Per, bool Aligned>() {
    backend.launch(norm_all<Per, Aligned>, dim3(static_cast<unsigned>(rows)), kThreads, 0, from, index,
                   weight, to, width, eps);
  });
}

}  // namespace tp::cuda::grouped
