// NCCL as the carrier between GPUs of one or several hosts. Two ranks: its all-reduce is one addition. More
// ranks: its order is its own, so an all-gather moves the bytes and our tree adds them.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <cstring>
#include <mutex>

#include "base/check.h"
#include "base/launch.cuh"
#include "base/tree.h"
#include "comm/collective.h"

namespace tp {

namespace {

// The part of nccl.h that we call; stable since NCCL 2.17.
using Comm = struct ncclComm*;
struct UniqueId {
  char bytes[128];
};
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21700;
  int blocking = 0;  // so that a start-up that hangs can be left
  int cga_cluster_size = INT_MIN, min_ctas = INT_MIN, max_ctas = INT_MIN;
  const char* net_name = nullptr;
};
enum Result { kSuccess = 0, kInProgress = 7 };
constexpr int kFloat32 = 7, kSum = 0;

/// Putting work on a stream only waits for connections that NCCL makes at the first use.
constexpr double kEnqueueSeconds = 10;
constexpr int kPollMicroseconds = 200;

struct Library {
  void* handle = nullptr;
  std::string why;  // it cannot be used
  std::string path;
  int (*GetVersion)(int*);
  int (*GetUniqueId)(UniqueId*);
  int (*CommInitRankConfig)(Comm*, int, UniqueId, int, Config*);
  int (*CommGetAsyncError)(Comm, int*);
  int (*CommAbort)(Comm);
  int (*AllReduce)(const void*, void*, size_t, int, int, Comm, cudaStream_t);
  int (*AllGather)(const void*, void*, size_t, int, Comm, cudaStream_t);
  const char* (*GetErrorString)(int);
  const char* (*GetLastError)(Comm);
};

const Library& library() {
  static const Library loaded = [] {
    Library lib{};
    lib.handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!lib.handle) {
      lib.why = dlerror();
      return lib;
    }
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(lib.handle, name));
      if (!function && lib.why.empty()) lib.why = std::string("libnccl.so.2 has no ") + name;
    };
    find(lib.GetVersion, "ncclGetVersion");
    find(lib.GetUniqueId, "ncclGetUniqueId");
    find(lib.CommInitRankConfig, "ncclCommInitRankConfig");
    find(lib.CommGetAsyncError, "ncclCommGetAsyncError");
    find(lib.CommAbort, "ncclCommAbort");
    find(lib.AllReduce, "ncclAllReduce");
    find(lib.AllGather, "ncclAllGather");
    find(lib.GetErrorString, "ncclGetErrorString");
    find(lib.GetLastError, "ncclGetLastError");
    Dl_info info{};
    if (lib.GetVersion && dladdr(reinterpret_cast<void*>(lib.GetVersion), &info) && info.dli_fname)
      lib.path = info.dli_fname;
    return lib;
  }();
  return loaded;
}

// parts: (N, floats) of all ranks; out: (floats), their sum in tree order.
template <int N>
__global__ void tree_kernel(const float* parts, float* out, int64_t floats) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < floats;
       i += int64_t{gridDim.x} * blockDim.x) {
    float values[N];
#pragma unroll
    for (int r = 0; r < N; r++) values[r] = parts[r * floats + i];
    out[i] = tree_sum(values, N);
  }
}

class Nccl final : public DeviceCollective {
 public:
  Nccl(int rank, int size, int64_t max_floats)
      : lib_(library()), rank_(rank), size_(size), max_floats_(max_floats) {
    if (!lib_.why.empty()) fail("TP_COLLECTIVE", "NCCL cannot be used: %s", lib_.why.c_str());
    if (rank == 0 && lib_.GetUniqueId(&id_) != kSuccess)
      fail("TP_COLLECTIVE", "nccl: no unique id: %s", lib_.GetLastError(nullptr));
    if (size > 2 && cudaMalloc(&parts_, sizeof(float) * max_floats * size) != cudaSuccess)
      fail("TP_MEMORY", "nccl: %lld bytes for the ranks' parts: %s",
           static_cast<long long>(sizeof(float) * max_floats * size), cudaGetErrorString(cudaGetLastError()));
  }

  ~Nccl() override {
    abort();
    cudaFree(parts_);
  }

  std::vector<uint8_t> hello() const override {
    return std::vector<uint8_t>(id_.bytes, id_.bytes + sizeof id_.bytes);
  }

  void connect(const std::vector<std::vector<uint8_t>>& hellos, double timeout_s) override {
    if (hellos.empty() || hellos[0].size() != sizeof id_.bytes)
      fail("TP_COLLECTIVE", "nccl: rank 0 sent no id");
    memcpy(id_.bytes, hellos[0].data(), sizeof id_.bytes);
    Config config;
    complete("start", timeout_s, [&] { return lib_.CommInitRankConfig(&comm_, size_, id_, rank_, &config); });
  }

  void all_reduce(float* buffer, int64_t floats, Stream on) override {
    const auto stream = static_cast<cudaStream_t>(on);
    if (floats == 0) return;
    if (size_ == 2)
      return complete("all-reduce", kEnqueueSeconds, [&] {
        return lib_.AllReduce(buffer, buffer, static_cast<size_t>(floats), kFloat32, kSum, comm_, stream);
      });
    if (floats > max_floats_)
      fail("TP_COLLECTIVE", "nccl: %lld floats, room for %lld", static_cast<long long>(floats),
           static_cast<long long>(max_floats_));
    all_gather(buffer, parts_, floats, on);
    const dim3 grid(static_cast<unsigned>((floats + 255) / 256));
    const cudaError_t status =
        launch_kernel({.grid = grid, .block = 256, .stream = stream},
                      size_ == 4 ? tree_kernel<4> : tree_kernel<8>, parts_, buffer, floats);
    if (status != cudaSuccess) fail("TP_COLLECTIVE", "nccl: adding: %s", cudaGetErrorString(status));
  }

  void all_gather(const float* send, float* gathered, int64_t floats, Stream on) override {
    if (floats == 0) return;
    complete("all-gather", kEnqueueSeconds, [&] {
      return lib_.AllGather(send, gathered, static_cast<size_t>(floats), kFloat32, comm_,
                            static_cast<cudaStream_t>(on));
    });
  }

  void abort() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (aborted_) return;
    last_words_ = async_error();  // nobody can be asked afterwards
    aborted_ = true;
    if (comm_) lib_.CommAbort(comm_);
    comm_ = nullptr;
  }

  std::string error() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return aborted_ ? stopped() : async_error();
  }

 private:
  /// Starts `call` and waits until it is done: a non-blocking communicator answers "in progress". abort() may
  /// come at any moment from another thread and takes the communicator away.
  template <class Call>
  void complete(const char* what, double timeout_s, Call&& call) {
    const auto start = std::chrono::steady_clock::now();
    int result = locked(call);
    while (result == kInProgress) {
      if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > timeout_s)
        fail("TP_COLLECTIVE",
             "nccl: %s took longer than %.0f s; is every rank there? NCCL_DEBUG=INFO says more", what,
             timeout_s);
      usleep(kPollMicroseconds);
      result = locked([&] {
        int state = kInProgress;
        const int asked = lib_.CommGetAsyncError(comm_, &state);
        return asked == kSuccess ? state : asked;
      });
    }
    if (result != kSuccess)
      fail("TP_COLLECTIVE", "nccl: %s: %s: %s", what, lib_.GetErrorString(result),
           lib_.GetLastError(nullptr));
  }

  template <class Call>
  int locked(Call&& call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (aborted_) fail("TP_COLLECTIVE", "%s", stopped().c_str());
    return call();
  }

  std::string stopped() const { return last_words_.empty() ? "nccl: told to stop waiting" : last_words_; }

  /// What has gone wrong behind the back of the calls, such as a lost peer or link; "" if nothing has.
  std::string async_error() const {
    int state = kSuccess;
    if (!comm_ || lib_.CommGetAsyncError(comm_, &state) != kSuccess || state == kSuccess ||
        state == kInProgress)
      return "";
    return std::string("nccl: ") + lib_.GetErrorString(state) + ": " + lib_.GetLastError(comm_);
  }

  const Library& lib_;
  const int rank_, size_;
  const int64_t max_floats_;
  UniqueId id_{};
  Comm comm_ = nullptr;
  bool aborted_ = false;
  std::string last_words_;  // the asynchronous error at the time of abort()
  float* parts_ = nullptr;  // (size, max_floats), more than two ranks
  mutable std::mutex mutex_;
};

}  // namespace

std::unique_ptr<DeviceCollective> make_nccl(int rank, int size, int64_t max_floats) {
  return std::make_unique<Nccl>(rank, size, max_floats);
}

std::string nccl_version(bool& usable) {
  const Library& lib = library();
  usable = lib.why.empty();
  if (!usable) return lib.why;
  int version = 0;
  lib.GetVersion(&version);
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100) + " (" + lib.path + ")";
}

}  // namespace tp
