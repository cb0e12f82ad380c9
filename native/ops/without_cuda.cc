// What stands in for native/ops/cuda in a build without CUDA: the same names, and a clear answer.
#include "base/check.h"
#include "ops/backend.h"
#include "ops/bench_moe.h"

namespace tp {

std::unique_ptr<Backend> make_cuda_backend(int) {
  fail("TP_DEVICE", "this addon was not compiled with CUDA; use --device cpu");
}

const char* cuda_version() { return nullptr; }

CudaDevices cuda_devices() { return {{}, "this addon was not compiled with CUDA"}; }

MoeBench bench_moe(int, const MoeShape&, const std::vector<MoeCase>&, int, uint32_t) {
  fail("TP_DEVICE", "this addon was not compiled with CUDA");
}

}  // namespace tp
