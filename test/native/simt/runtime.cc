// The CUDA runtime's functions: streams are lists of what is to be done, and the device works on them while
// the host waits for one; so what the host reads too early is not there yet.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <unordered_map>

#include "scheduler.h"

namespace simt {

struct Event {
  bool recorded = false, done = true;
  uint64_t ns = 0;
};

/// A kernel, or what the copy engine or the stream itself does.
struct Action {
  std::function<void()> work;  // null: the kernel
  Launch launch;
};

struct Graph {
  std::vector<Action> actions;
};

struct Stream {
  int device = 0;
  std::deque<Action> queue;
  std::vector<std::shared_ptr<Grid>> active;
  std::unique_ptr<Graph> capture;
};

namespace {

constexpr int kDevices = 8;
constexpr size_t kMostShared = 232448, kSharedUnasked = 48 << 10, kSharedOfProcessor = 233472;

int device_ = 0;
cudaError_t broken_[kDevices] = {};  // by a kernel that faulted
cudaError_t last_ = cudaSuccess;
std::vector<Stream*> streams_;
std::map<std::pair<int, const void*>, size_t> asked_;         // dynamic shared memory, by device and kernel
std::unordered_map<void*, std::pair<char*, size_t>> blocks_;  // what was mapped, by address given out

cudaError_t say(cudaError_t status) {
  if (status != cudaSuccess) last_ = status;
  return status;
}

void put(Stream* stream, Action action) {
  if (stream->capture)
    stream->capture->actions.push_back(std::move(action));
  else
    stream->queue.push_back(std::move(action));
}

/// Starts what may start. True if something was.
bool advance(Stream& stream) {
  bool any = false;
  for (;;) {
    bool failed = false;
    for (const auto& grid : stream.active) failed |= grid->failed;
    if (failed) broken_[stream.device] = cudaErrorLaunchFailure, stream.queue.clear();
    std::erase_if(stream.active, [](const auto& grid) { return grid->done; });
    if (stream.queue.empty()) return any;
    Action& next = stream.queue.front();
    if (!stream.active.empty()) {
      // A kernel may begin early; whether it does is chance.
      if (next.work || !next.launch.overlaps || stream.active.size() > 2 ||
          !stream.active.back()->lets_next_start() || draw(4) == 0)
        return any;
    }
    if (next.work) {
      next.work();
    } else {
      auto grid = std::make_shared<Grid>();
      grid->launch = std::move(next.launch);
      if (!stream.active.empty()) grid->before = stream.active.back();
      stream.active.push_back(grid);
      start(std::move(grid));
    }
    stream.queue.pop_front();
    any = true;
  }
}

template <class Over>
void work_until(Over&& over) {
  begin_waiting();
  while (!over()) {
    bool any = false;
    if (!streams_.empty()) {
      const size_t first = draw(streams_.size());
      for (size_t i = 0; i < streams_.size(); i++) any |= advance(*streams_[(first + i) % streams_.size()]);
    }
    if (over()) break;
    if (turn() || any) continue;
    for (Stream* stream : streams_) any |= advance(*stream);
    if (!any && !over()) std::fprintf(stderr, "simt: the host waits for what nobody will do\n"), std::abort();
  }
  // Leaves the host's own memory in place.
  if (streams_.empty()) turn();
}

bool idle(const Stream& stream) { return stream.queue.empty() && stream.active.empty(); }

}  // namespace

void reset() {
  stop_all();
  for (Stream* stream : streams_) stream->queue.clear(), stream->active.clear(), stream->capture.reset();
  for (cudaError_t& status : broken_) status = cudaSuccess;
  last_ = cudaSuccess;
}

}  // namespace simt

using namespace simt;

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "unspecified launch failure";
  }
}
cudaError_t cudaGetLastError() {
  const cudaError_t status = broken_[device_] ? broken_[device_] : last_;
  last_ = cudaSuccess;
  return status;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  if (device < 0 || device >= kDevices) return say(cudaErrorInvalidDevice);
  *out = {};
  std::strcpy(out->name, "emulated");
  out->major = 9;
  out->multiProcessorCount = processor_count();
  out->sharedMemPerBlockOptin = kMostShared;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return say(cudaErrorInvalidDevice);
  device_ = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  work_until([] {
    return std::all_of(streams_.begin(), streams_.end(),
                       [](const Stream* s) { return s->device != device_ || idle(*s); });
  });
  return say(broken_[device_]);
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int room, int device) {
  std::snprintf(text, static_cast<size_t>(room), "0000:%02x:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* out, int, int) {
  *out = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetP2PAttribute(int* out, cudaDeviceP2PAttr, int, int) {
  *out = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = std::strcmp(name, "cuTensorMapEncodeTiled") == 0
                  ? reinterpret_cast<void*>(cuTensorMapEncodeTiled)
                  : nullptr;
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t dimensions, void* memory,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *map = {};
  map->memory = static_cast<const char*>(memory);
  map->dimensions = dimensions;
  map->swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  bool good = (dimensions == 2 || dimensions == 3) && reinterpret_cast<uintptr_t>(memory) % 16 == 0;
  for (cuuint32_t i = 0; good && i < dimensions; i++) {
    map->sizes[i] = sizes[i], map->box[i] = box[i];
    good = sizes[i] > 0 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    if (i + 1 < dimensions) map->strides[i] = strides[i], good &= strides[i] > 0 && strides[i] % 16 == 0;
  }
  const uint64_t row = uint64_t{map->box[0]} * 2;
  good &= row % 16 == 0 && (!map->swizzled || row <= 128);
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/// The end lies at the end of mapped memory, as near as 256 bytes: what is past it is not there.
cudaError_t simt_allocate(void** memory, size_t bytes) {
  constexpr size_t kPage = 4096;
  const size_t room = (std::max(bytes, size_t{1}) + 255) / 256 * 256,
               all = (room + kPage - 1) / kPage * kPage + kPage;
  void* const mapped = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return say(cudaErrorMemoryAllocation);
  auto* const begin = static_cast<char*>(mapped);
  mprotect(begin + all - kPage, kPage, PROT_NONE);
  *memory = begin + all - kPage - room;
  std::memset(*memory, 0xff, room);
  blocks_[*memory] = {begin, all};
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (!memory) return cudaSuccess;
  cudaDeviceSynchronize();
  const auto found = blocks_.find(memory);
  if (found == blocks_.end()) return say(cudaErrorInvalidValue);
  munmap(found->second.first, found->second.second);
  blocks_.erase(found);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{8} << 30;
  return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  put(stream, {[=] { std::memset(memory, value, bytes); }, {}});
  return say(broken_[stream->device]);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  put(stream, {[=] { std::memcpy(to, from, bytes); }, {}});
  return say(broken_[stream->device]);
}
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory) {
  *handle = {};
  std::memcpy(handle->reserved, &memory, sizeof memory);
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** memory, cudaIpcMemHandle_t handle, unsigned) {
  std::memcpy(memory, handle.reserved, sizeof *memory);
  return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new Stream;
  (*stream)->device = device_;
  streams_.push_back(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  cudaStreamSynchronize(stream);
  std::erase(streams_, stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  work_until([=] { return idle(*stream); });
  return say(broken_[stream->device]);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->capture = std::make_unique<Graph>();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream->capture.release();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new Graph(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const Action& action : exec->actions) put(stream, action);
  return say(broken_[stream->device]);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new Event;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event) cudaEventSynchronize(event);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->done = false;
  put(stream, {[=] { event->done = true, event->ns = clock_ns(); }, {}});
  return say(broken_[stream->device]);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  work_until([=] { return event->done; });
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  *ms = static_cast<float>(to->ns - from->ns) / 1e6f;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (static_cast<size_t>(value) > kMostShared) return say(cudaErrorInvalidValue);
  asked_[{device_, kernel}] = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t simt_function_attributes(cudaFuncAttributes* out, const void* kernel) {
  const auto asked = asked_.find({device_, kernel});
  out->sharedSizeBytes = static_shared_bytes();
  out->maxDynamicSharedSizeBytes = static_cast<int>(asked == asked_.end() ? kSharedUnasked : asked->second);
  return cudaSuccess;
}
cudaError_t simt_launch(const cudaLaunchConfig_t* config, const void* kernel, std::function<void()> body) {
  if (config->stream->device != device_) return say(cudaErrorInvalidResourceHandle);
  Launch launch;
  launch.kernel = kernel;
  launch.body = std::move(body);
  launch.grid = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  launch.block = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  launch.shared = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) launch.together = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension) launch.cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch.overlaps = attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z,
               threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  const auto asked = asked_.find({config->stream->device, kernel});
  const size_t most = asked == asked_.end() ? kSharedUnasked : asked->second;
  if (blocks == 0 || threads == 0 || threads > 1024 || launch.shared > most || launch.cluster == 0 ||
      launch.grid.x % launch.cluster)
    return say(cudaErrorInvalidValue);
  const size_t of_processor = std::min(2048 / threads, kSharedOfProcessor / (launch.shared + 1024));
  if (launch.together && blocks > of_processor * static_cast<size_t>(processor_count()))
    return say(cudaErrorCooperativeLaunchTooLarge);
  put(config->stream, {nullptr, std::move(launch)});
  return say(broken_[config->stream->device]);
}
