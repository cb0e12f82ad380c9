// The checks of the CUDA kernels, on a GPU: gpu_check [check | small | quick] [many] [fused] [ranks]; exit
// code 1 when a comparison fails. Built with nvcc from this file, ops_check.cu, resident_check.cu and the
// addon's objects.
#include "test/native/resident_check.h"

using namespace tp;
using namespace tp::test;

int main(int argc, char** argv) {
  const auto asked = [&](const char* what) {
    for (int i = 1; i < argc; i++)
      if (std::string(argv[i]) == what) return true;
    return argc == 1;
  };
  try {
    cpu = make_cpu_backend("auto", 12);
    gpu = std::make_unique<cuda::CudaBackend>(0);
    const bool many = argc > 1 && asked("many"), small = argc > 1 && asked("small");
    if (asked("check") || small) check_all(small, many);
    if (argc > 1 && asked("quick")) check_quick();
    const std::vector<std::vector<int>> steps = {{0}, {5, 63, 64, 100}, {1023, 1050, 700, 3}};
    if (asked("fused")) {
      test_fused(kReal, 6, 1100, steps, {1, 2, 5, 8, 9, 13, 16}, 3);
      test_stretches(kReal, 6, 1100, {0, 70}, {1, 2, 8, 16}, 4, 1);
      test_replay(kReal, 6, 1100, 2);
      test_choice(kReal, 1), test_choice(kReal, 2);
    }
    if (asked("ranks"))
      for (const int size : {2, 4}) test_ranks(kReal, size, 6, 1100, steps, {1, 16, 2, 11, 8});
    gpu.reset();
  } catch (const Error& error) {
    std::printf("FAIL %s: %s\n", error.code().c_str(), error.what());
    return 1;
  }
  std::printf("%d comparisons, %d failures\n", comparisons, failures);
  return failures > 0 ? 1 : 0;
}
