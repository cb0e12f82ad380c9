// What stands in for the device collectives in a build without CUDA.
#include "base/check.h"
#include "comm/collective.h"
#include "comm/topology.h"

namespace tp {

std::unique_ptr<DeviceCollective> make_peer(int, int, int64_t) {
  fail("TP_COLLECTIVE", "peer: this addon was not compiled with CUDA");
}

std::unique_ptr<DeviceCollective> make_nccl(int, int, int64_t) {
  fail("TP_COLLECTIVE", "nccl: this addon was not compiled with CUDA");
}

GpuTopology gpu_topology() {
  GpuTopology none;
  none.why = "this addon was not compiled with CUDA";
  return none;
}

std::string nccl_version(bool& usable) {
  usable = false;
  return "this addon was not compiled with CUDA";
}

}  // namespace tp
