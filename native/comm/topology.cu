#include <cuda_runtime.h>
#include <dlfcn.h>

#include <type_traits>

#include "comm/topology.h"

namespace tp {

namespace {

// The part of nvml.h that we call; stable since its version 2 names.
using Device = struct nvmlDevice_st*;
constexpr unsigned kMostLinks = 18;  // of one GPU, NVML_NVLINK_MAX_LINKS

struct Nvml {
  std::string why;
  int (*Init)();
  int (*DriverVersion)(char*, unsigned);
  int (*HandleByPciBusId)(const char*, Device*);
  int (*NvLinkState)(Device, unsigned, unsigned*);
};

Nvml open_nvml() {
  Nvml nvml{};
  void* const handle = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    nvml.why = dlerror();
    return nvml;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
    if (!function && nvml.why.empty()) nvml.why = std::string("libnvidia-ml.so.1 has no ") + name;
  };
  find(nvml.Init, "nvmlInit_v2");
  find(nvml.DriverVersion, "nvmlSystemGetDriverVersion");
  find(nvml.HandleByPciBusId, "nvmlDeviceGetHandleByPciBusId_v2");
  find(nvml.NvLinkState, "nvmlDeviceGetNvLinkState");
  if (nvml.why.empty())
    if (const int status = nvml.Init()) nvml.why = "NVML does not start: status " + std::to_string(status);
  return nvml;
}

/// Links that answer and are up; -1 when the GPU cannot be asked.
int active_links(const Nvml& nvml, const char* bus) {
  Device device = nullptr;
  if (!nvml.why.empty() || nvml.HandleByPciBusId(bus, &device) != 0) return -1;
  int active = 0;
  for (unsigned link = 0; link < kMostLinks; link++) {
    unsigned up = 0;
    if (nvml.NvLinkState(device, link, &up) == 0 && up) active++;  // a GPU without that link refuses
  }
  return active;
}

/// Whether memory of the current GPU can be handed to other processes.
std::string ipc_obstacle() {
  void* memory = nullptr;
  cudaError_t status = cudaMalloc(&memory, 4096);
  if (status == cudaSuccess) {
    cudaIpcMemHandle_t handle;
    status = cudaIpcGetMemHandle(&handle, memory);
    cudaFree(memory);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace

GpuTopology gpu_topology() {
  GpuTopology out;
  int version = 0, count = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess && version > 0)
    out.cuda = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    count = 0;
  }
  const Nvml nvml = open_nvml();
  out.why = nvml.why;
  char driver[96] = "";
  if (nvml.why.empty() && nvml.DriverVersion(driver, sizeof driver) == 0) out.driver = driver;

  for (int i = 0; i < count; i++) {
    char bus[32] = "";
    cudaDeviceGetPCIBusId(bus, sizeof bus, i);
    out.pci.emplace_back(bus);
    out.nvlinks.push_back(active_links(nvml, bus));
    const cudaError_t status = cudaSetDevice(i);
    out.ipc.push_back(status == cudaSuccess ? ipc_obstacle() : cudaGetErrorString(status));
    for (int other = 0; other < count; other++) {
      if (other == i) continue;
      int access = 0, atomics = 0;
      cudaDeviceGetP2PAttribute(&access, cudaDevP2PAttrAccessSupported, i, other);
      cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, i, other);
      out.pairs.push_back({i, other, access != 0, atomics != 0});
    }
  }
  cudaGetLastError();
  return out;
}

}  // namespace tp
