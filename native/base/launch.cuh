// Starts a kernel, in the order of its stream, through the runtime's own function: no syntax that only nvcc
// knows.
#pragma once

#include <cuda_runtime.h>

namespace tp {

struct Launch {
  dim3 grid;
  int block;  // threads
  cudaStream_t stream;
  size_t shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;    // blocks that can meet
  /// May start before the kernel in front of it ends: it calls griddepcontrol_wait() before it touches
  /// anything that earlier kernels wrote.
  bool overlap = false;
  /// All blocks run at once, or the launch fails: they wait for each other.
  bool together = false;
};

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(const Launch& launch, void (*kernel)(Parameters...),
                          const Arguments&... arguments) {
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  const auto next = [&](cudaLaunchAttributeID id) -> cudaLaunchAttributeValue& {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = id;
    return attribute.val;
  };
  if (launch.overlap)
    next(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
  if (launch.together) next(cudaLaunchAttributeCooperative).cooperative = 1;
  if (launch.cluster > 1) {
    auto& dim = next(cudaLaunchAttributeClusterDimension).clusterDim;
    dim.x = static_cast<unsigned>(launch.cluster);
    dim.y = dim.z = 1;
  }
  config.gridDim = launch.grid;
  config.blockDim = dim3(static_cast<unsigned>(launch.block));
  config.dynamicSmemBytes = launch.shared;
  config.stream = launch.stream;
  config.attrs = attributes;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace tp
