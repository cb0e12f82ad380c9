#pragma once

#include <cstdint>

#include "ops/cuda/cuda.h"

namespace tp::cuda {

/// Starts a kernel that reads all of `memory`, and adds what it finds to `sum`.
void start_stream(const void* memory, uint64_t bytes, unsigned long long* sum, CudaBackend&);

}  // namespace tp::cuda
