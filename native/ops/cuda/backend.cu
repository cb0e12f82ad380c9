// One GPU: its memory, one stream on which all ops run in order, and recorded steps.
#include <algorithm>
#include <string>

#include "ops/cuda/block.cuh"

namespace tp {

namespace cuda {

namespace {

constexpr size_t kStaging = size_t{16} << 20;
constexpr int kMostHeadDim = 512, kMostTopK = 32;

}  // namespace

void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  if (status != cudaErrorMemoryAllocation) fail("TP_CUDA", "%s: %s", doing, cudaGetErrorString(status));
  fail("TP_MEMORY", "%s: the GPU is out of memory", doing);
}

CudaBackend::CudaBackend(int device) : device_(device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0)
    fail("TP_DEVICE", "no usable GPU: %s; use --device cpu", cudaGetErrorString(status));
  if (device < 0 || device >= count) fail("TP_DEVICE", "GPU %d of %d", device, count);
  check(cudaSetDevice(device), "choosing the GPU");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "asking for the GPU's properties");
  if (properties.major < 9)
    fail("TP_DEVICE", "GPU %d (%s) has compute capability %d.%d, the kernels need 9.0", device,
         properties.name, properties.major, properties.minor);
  processors_ = properties.multiProcessorCount;
  shared_memory_ = static_cast<int>(properties.sharedMemPerBlockOptin);
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
  check(cudaMallocHost(&staging_, kStaging), "allocating pinned memory");
}

CudaBackend::~CudaBackend() {
  cudaSetDevice(device_);
  cudaStreamSynchronize(stream_);
  for (const auto& [key, graph] : graphs_) cudaGraphExecDestroy(graph);
  for (void* block : blocks_) cudaFree(block);
  for (void* block : shared_blocks_) cudaFreeHost(block);
  cudaFreeHost(staging_);
  cudaStreamDestroy(stream_);
}

void* CudaBackend::allocate(size_t bytes) {
  enter();
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, std::max(bytes, size_t{16}));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    fail("TP_MEMORY",
         "asked for %.2f GB on GPU %d, %.2f of %.2f GB are free; use more GPUs or a smaller model",
         static_cast<double>(bytes) / 1e9, device_, static_cast<double>(free) / 1e9,
         static_cast<double>(total) / 1e9);
  }
  check(status, "allocating");
  blocks_.push_back(memory);
  check(cudaMemsetAsync(memory, 0, std::max(bytes, size_t{16}), stream_), "clearing memory");
  return memory;
}

void* CudaBackend::allocate_shared(size_t bytes) {
  enter();
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable),
        "allocating pinned memory");
  std::memset(memory, 0, bytes);
  shared_blocks_.push_back(memory);
  return memory;  // one address for both sides: unified addressing is a given on 64-bit Linux
}

void CudaBackend::enter() { check(cudaSetDevice(device_), "choosing the GPU"); }

void CudaBackend::finish() {
  enter();
  check(cudaStreamSynchronize(stream_), "running a step");
}

void* CudaBackend::workspace(const char* name, size_t bytes) {
  Work& work = workspaces_[name];
  if (work.bytes < bytes) work = {allocate(bytes), bytes};  // recorded steps may still use the old one
  return work.memory;
}

void CudaBackend::parallel(int count, void (*work)(void*, int, int), void* context) {
  for (int i = 0; i < count; i++) work(context, i, 0);
}

void* CudaBackend::scratch(int, size_t bytes) {
  if (scratch_.size() < bytes) scratch_.resize(bytes);
  return scratch_.data();
}

void CudaBackend::write(void* device, const void* host, size_t bytes) {
  enter();
  for (size_t done = 0; done < bytes; done += kStaging) {
    const size_t piece = std::min(kStaging, bytes - done);
    std::memcpy(staging_, static_cast<const char*>(host) + done, piece);
    check(
        cudaMemcpyAsync(static_cast<char*>(device) + done, staging_, piece, cudaMemcpyHostToDevice, stream_),
        "writing to the GPU");
    check(cudaStreamSynchronize(stream_), "writing to the GPU");
  }
}

void CudaBackend::read(void* host, const void* device, size_t bytes) {
  enter();
  for (size_t done = 0; done < bytes; done += kStaging) {
    const size_t piece = std::min(kStaging, bytes - done);
    check(cudaMemcpyAsync(staging_, static_cast<const char*>(device) + done, piece, cudaMemcpyDeviceToHost,
                          stream_),
          "reading from the GPU");
    check(cudaStreamSynchronize(stream_), "reading from the GPU");
    std::memcpy(static_cast<char*>(host) + done, staging_, piece);
  }
}

void CudaBackend::require(const Dims& d, const Heads& h) const {
  const auto most = [](const char* what, int value, int limit) {
    if (value > limit) fail("TP_LIMIT", "%s: %d, the CUDA kernels take at most %d", what, value, limit);
  };
  most("hidden size", d.hidden, kMostRow);
  most("experts", d.experts, kMostExperts);
  most("experts a token", d.top_k, kMostTopK);
  most("head size", h.head_dim, kMostHeadDim);
  if (h.head_dim % 2) fail("TP_LIMIT", "head size: %d, the CUDA kernels take even ones", h.head_dim);
}

void CudaBackend::prepare(const void* kernel, size_t shared) {
  const auto [found, first] = prepared_.emplace(kernel, 0);
  if (first)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "setting a kernel up");
  if (shared <= found->second) return;
  if (shared > static_cast<size_t>(shared_memory_))
    fail("TP_LIMIT", "a kernel needs %zu bytes of shared memory for this model, the GPU gives %d", shared,
         shared_memory_);
  // The limit is the device's, and another backend on it may have asked for more.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "asking for a kernel's needs");
  if (attributes.maxDynamicSharedSizeBytes < static_cast<int>(shared))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "setting a kernel up");
  found->second = shared;
}

void CudaBackend::replay(uint64_t key, const std::function<void()>& work) {
  enter();
  const auto found = graphs_.find(key);
  if (found != graphs_.end()) {
    check(cudaGraphLaunch(found->second, stream_), "starting a recorded step");
    return;
  }
  // The first time runs it as it is: kernels are set up and working memory grows, which a recording could not
  // do.
  if (!seen_[key]) {
    seen_[key] = true;
    work();
    return;
  }
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "recording a step");
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream_, &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  check(cudaStreamEndCapture(stream_, &graph), "recording a step");
  cudaGraphExec_t recorded = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&recorded, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "recording a step");
  graphs_[key] = recorded;
  check(cudaGraphLaunch(recorded, stream_), "starting a recorded step");
}

}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(int device) { return std::make_unique<cuda::CudaBackend>(device); }

CudaDevices cuda_devices() {
  CudaDevices out;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    out.why = cudaGetErrorString(status);
    cudaGetLastError();
    return out;
  }
  for (int i = 0; i < count; i++) {
    cudaDeviceProp properties;
    cuda::check(cudaGetDeviceProperties(&properties, i), "asking for a GPU's properties");
    cuda::check(cudaSetDevice(i), "choosing a GPU");
    size_t free = 0, total = 0;
    cuda::check(cudaMemGetInfo(&free, &total), "asking for a GPU's memory");
    CudaDevice device{properties.name,           properties.major,           properties.minor,
                      static_cast<double>(free), static_cast<double>(total), {}};
    for (int other = 0; other < count; other++) {
      int reaches = 0;
      if (other != i && cudaDeviceCanAccessPeer(&reaches, i, other) == cudaSuccess && reaches)
        device.peers.push_back(other);
    }
    out.devices.push_back(std::move(device));
  }
  return out;
}

const char* cuda_version() {
  static const std::string version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return version.c_str();
}

}  // namespace tp
