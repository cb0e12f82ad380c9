#include "base/launch.cuh"
#include "ops/cuda/block.cuh"
#include "ops/cuda/stream.h"

namespace tp::cuda {

namespace {

__global__ void __launch_bounds__(kThreads) make_elements(Synthetic source, Stretch stretch, Bf16* out) {
  const uint64_t all = stretch.count * stretch.rows;
  for (uint64_t i = blockIdx.x * uint64_t{kThreads} + threadIdx.x; i < all;
       i += uint64_t{kThreads} * gridDim.x)
    out[i] =
        synthetic_element(source, stretch.start + i / stretch.count * stretch.stride + i % stretch.count);
}

__global__ void __launch_bounds__(256)
    read_all(const uint4* memory, uint64_t pieces, unsigned long long* sum) {
  constexpr int kFlight = 8;
  uint32_t seen = 0;
  const uint64_t step = uint64_t{gridDim.x} * 256;
  uint64_t i = blockIdx.x * uint64_t{256} + threadIdx.x;
  for (; i + (kFlight - 1) * step < pieces; i += kFlight * step) {
    uint4 x[kFlight];
#pragma unroll
    for (int j = 0; j < kFlight; j++) x[j] = __ldcs(memory + i + j * step);
#pragma unroll
    for (int j = 0; j < kFlight; j++) seen += x[j].x + x[j].y + x[j].z + x[j].w;
  }
  for (; i < pieces; i += step) seen += memory[i].x + memory[i].y + memory[i].z + memory[i].w;
  if (seen != 0) atomicAdd(sum, seen);
}

void synthesize(const Synthetic& source, const Stretch& stretch, Bf16* out, Backend& backend) {
  CudaBackend& cuda = of(backend);
  const uint64_t blocks = (stretch.count * stretch.rows + kThreads - 1) / kThreads,
                 most = static_cast<uint64_t>(cuda.processors()) * 4;
  const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
  check(launch_kernel({.grid = grid, .block = kThreads, .stream = cuda.stream()}, make_elements, source,
                      stretch, out),
        "making synthetic weights");
}

uint64_t stream(const void* memory, uint64_t bytes, Backend& backend) {
  CudaBackend& cuda = of(backend);
  auto* const sum = static_cast<unsigned long long*>(cuda.workspace("stream", sizeof(unsigned long long)));
  start_stream(memory, bytes, sum, cuda);
  uint64_t seen = 0;
  cuda.read(&seen, sum, sizeof seen);
  return seen;
}

}  // namespace

void start_stream(const void* memory, uint64_t bytes, unsigned long long* sum, CudaBackend& cuda) {
  const dim3 grid(static_cast<unsigned>(cuda.processors() * 8));
  check(launch_kernel({.grid = grid, .block = 256, .stream = cuda.stream()}, read_all,
                      static_cast<const uint4*>(memory), bytes / sizeof(uint4), sum),
        "reading memory");
}

const Ops& ops() {
  static const Ops table = {angles,  embed,  qkv,    attention, attn_out,  route,      gate_up, down,
                            ffn_out, logits, sample, advance,   note_time, synthesize, stream};
  return table;
}

}  // namespace tp::cuda
