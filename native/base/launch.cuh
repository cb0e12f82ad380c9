// Starts a kernel, in the order of its stream, through the runtime's own function: no syntax that only nvcc
// knows.
#pragma once

#include <cuda_runtime.h>

namespace tp {

/// overlap: the kernel may start before the one in front of it ends, so it must call griddepcontrol_wait()
/// before it touches anything that earlier kernels wrote.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int block, cudaStream_t stream,
                          bool overlap, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace tp
