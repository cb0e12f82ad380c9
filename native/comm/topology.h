// How this host's GPUs are joined, for people: what a run would choose from it, src/comm/collective.ts
// decides.
#pragma once

#include <string>
#include <vector>

namespace tp {

/// Two GPUs as one sees the other.
struct GpuPair {
  int from, to;
  bool access;   // `from` reaches the memory of `to`
  bool atomics;  // also with atomics, which links slower than NVLink lack
};

struct GpuTopology {
  std::string driver;            // "580.95.05"; empty: see why
  std::string cuda;              // newest CUDA that the driver runs: "13.0"; empty without a driver
  std::string why;               // NVML cannot be asked
  std::vector<int> nvlinks;      // by GPU: active NVLinks, -1 = not known
  std::vector<std::string> pci;  // by GPU: bus id
  std::vector<std::string> ipc;  // by GPU: empty when its memory can be opened by other processes, or why not
  std::vector<GpuPair> pairs;
};

/// Asks the driver and NVML (libnvidia-ml.so.1, opened at run time); makes a context on every GPU.
GpuTopology gpu_topology();

}  // namespace tp
