// Kernels that are wrong on purpose: the emulator must say so, and must say nothing of the same kernels done
// right. Prints a line a case; exit code 1 when one is not as expected.
#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

#include "base/launch.cuh"
#include "base/ptx.cuh"

namespace {

namespace ptx = tp::ptx;

constexpr int kThreads = 128;

// ---- races: the result is wrong with some seeds

/// out (kThreads): the values of in, the last first.
__global__ void reverse(const int* in, int* out, bool right) {
  __shared__ int room[kThreads];
  room[threadIdx.x] = in[threadIdx.x];
  if (right) __syncthreads();
  out[threadIdx.x] = room[kThreads - 1 - threadIdx.x];
}

/// The same among the lanes of a warp.
__global__ void reverse_warp(const int* in, int* out, bool right) {
  TP_DYNAMIC_SHARED(int, room, 16);  // (kThreads)
  room[threadIdx.x] = in[threadIdx.x];
  if (right) __syncwarp();
  out[threadIdx.x] = room[threadIdx.x ^ 31];
}

/// A second round writes what others may still have to read.
__global__ void rotate_twice(const int* in, int* out, bool right) {
  __shared__ int room[kThreads];
  int x = in[threadIdx.x];
  for (int round = 0; round < 2; round++) {
    room[threadIdx.x] = x;
    __syncthreads();
    x = room[(threadIdx.x + 1) % kThreads];
    if (right) __syncthreads();
  }
  out[threadIdx.x] = x;
}

__global__ void copy_by_thread(const int* in, int* out, bool right) {
  TP_DYNAMIC_SHARED(int, room, 16);  // (kThreads)
  if (threadIdx.x < kThreads / 4)
    ptx::cp_async_16(ptx::shared_address(room + threadIdx.x * 4), in + threadIdx.x * 4);
  ptx::cp_async_commit();
  if (right)
    ptx::cp_async_wait<0>();
  else
    ptx::cp_async_wait<1>();  // leaves the one that matters on its way
  __syncthreads();
  out[threadIdx.x] = room[threadIdx.x];
}

__global__ void copy_by_engine(const int* in, int* out, bool right) {
  TP_DYNAMIC_SHARED(int, room, 128);  // (kThreads)
  __shared__ uint64_t barrier;
  const uint32_t at = ptx::shared_address(&barrier);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init<1>(at);
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive_expect_tx(at, kThreads * 4);
    ptx::cp_async_bulk(ptx::shared_address(room), in, kThreads * 4, at, 0);
  }
  __syncthreads();
  const int early = room[threadIdx.x];
  while (!ptx::mbarrier_try_wait(at, 0)) {
  }
  out[threadIdx.x] = right ? room[threadIdx.x] : early;
}

/// The value and the flag that announces it, by stores in no order; right: with a fence between.
__global__ void tell(const int* in, int* out, bool right) {
  auto* const line = reinterpret_cast<float*>(out + 4);  // (4): value, flag; zero before
  if (blockIdx.x == 0) {
    if (threadIdx.x > 0) return;
    ptx::st_relaxed_gpu(line, static_cast<float>(in[0]));
    if (right) __threadfence_system();
    ptx::st_relaxed_gpu(line + 1, 1);
  } else if (threadIdx.x == 0) {
    uint4 seen;
    do seen = ptx::ld_relaxed_gpu_v4(line);
    while (seen.y == 0);
    seen = ptx::ld_relaxed_gpu_v4(line);
    out[0] = static_cast<int>(__uint_as_float(seen.x));
  }
}

/// Adds one, as a kernel that starts before the one before it ends.
__global__ void increment(int* values, bool right) {
  if (right) ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int x = values[threadIdx.x];
  __nanosleep(100);
  values[threadIdx.x] = x + 1;
}

// ---- faults: reported with any seed

enum Fault {
  kPartOfMask,
  kOutsideMask,
  kOtherCollective,
  kPartOfWarp,
  kOtherCount,
  kTooFew,
  kNoArrival,
  kNoBytes,
  kNoInit,
  kTooManyArrivals,
  kBehindDynamic,
  kBehindByAddress,
  kLeftBehind,
  kTrap,
  kFaults
};
struct Expected {
  const char* name;
  const char* words;  // of the report
};
constexpr Expected kExpected[kFaults] = {
    {"half a warp shuffles with a full mask", "have ended"},
    {"a lane that the mask leaves out", "leaves out"},
    {"lanes in different collectives", "lanes of a warp part"},
    {"half a warp at a barrier", "only lanes"},
    {"a barrier with two counts", "threads that came before wait for"},
    {"a barrier that too few come to", "deadlock"},
    {"an mbarrier that nobody arrives at", "nothing changes"},
    {"an mbarrier whose bytes never come", "nothing changes"},
    {"an mbarrier that nobody initialised", "not initialised"},
    {"an mbarrier with one arrival too many", "more than its 1 arrivals"},
    {"a write behind dynamic shared memory", "wrote behind its 512 bytes"},
    {"a load behind it by address", "shared memory at 528 of 512"},
    {"a block that ends before its copy", "on their way"},
    {"a trap", "__trap"},
};

__global__ void wrong(Fault fault, const int* in, int* out) {
  TP_DYNAMIC_SHARED(int, room, 128);  // (kThreads)
  __shared__ uint64_t barrier;
  const int lane = threadIdx.x % 32;
  const uint32_t at = ptx::shared_address(&barrier);
  if (threadIdx.x == 0 && fault != kNoInit) ptx::mbarrier_init<1>(at);
  __syncthreads();
  switch (fault) {
    case kPartOfMask:
      if (lane < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, lane, 1);
      return;
    case kOutsideMask:
      out[threadIdx.x] = static_cast<int>(__ballot_sync(0xffffu, lane));
      return;
    case kOtherCollective:
      if (lane < 16)
        out[threadIdx.x] = __all_sync(~0u, lane < 32);
      else
        __syncwarp();
      return;
    case kPartOfWarp:
      if (lane < 16) ptx::bar_sync(1, 64);
      __syncthreads();
      return;
    case kOtherCount:
      ptx::bar_sync(1, threadIdx.x < 64 ? 128 : 96);
      return;
    case kTooFew:
      ptx::bar_sync(1, 2 * kThreads);
      return;
    case kNoArrival:
      while (!ptx::mbarrier_try_wait(at, 0)) {
      }
      return;
    case kNoBytes:
      if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(at, 64);
      if (threadIdx.x == 0) ptx::cp_async_bulk(ptx::shared_address(room), in, 48, at, 0);
      while (!ptx::mbarrier_try_wait(at, 0)) {
      }
      return;
    case kNoInit:
      ptx::mbarrier_arrive(at);
      return;
    case kTooManyArrivals:
      if (threadIdx.x < 2) {
        ptx::mbarrier_arrive_expect_tx(at, 16);
      }
      return;
    case kBehindDynamic:
      room[threadIdx.x + 1] = 7;
      return;
    case kBehindByAddress:
      out[threadIdx.x] = static_cast<int>(ptx::ld_shared_v4(ptx::shared_address(room) + 512).x);
      return;
    case kLeftBehind:
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect_tx(at, 512);
        for (int i = 0; i < 32; i++)
          ptx::cp_async_bulk(ptx::shared_address(room + i * 4), in + i * 4, 16, at, 0);
      }
      return;
    case kTrap:
      if (threadIdx.x == 77) __trap();
      __syncthreads();
      return;
    default:
      return;
  }
}

int bad = 0;

void say(bool good, const char* name, const char* what) {
  std::printf("%s %s%s%s\n", good ? "ok" : "FAIL", name, *what ? ": " : "", what);
  bad += !good;
}

struct Memory {
  int* values;
  explicit Memory(int count) { cudaMalloc(&values, static_cast<size_t>(count) * sizeof(int)); }
  ~Memory() { cudaFree(values); }
};

cudaStream_t stream;

void launch(void (*kernel)(const int*, int*, bool), const int* in, int* out, bool right,
            unsigned blocks = 1) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kThreads * sizeof(int);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, in, out, right);
}

/// Right must be right with every seed, wrong must show with some.
template <class Run>
void race(const char* name, Run&& run) {
  constexpr int kSeeds = 40;
  const int faults = simt::faults();
  int wrong_right = 0, wrong_wrong = 0;
  for (int seed = 1; seed <= kSeeds; seed++)
    for (const bool right : {true, false}) {
      simt::seed(static_cast<uint64_t>(seed));
      (right ? wrong_right : wrong_wrong) += !run(right);
    }
  char what[128];
  std::snprintf(what, sizeof what, "seen with %d of %d seeds, done right %d", wrong_wrong, kSeeds,
                wrong_right);
  say(wrong_right == 0 && wrong_wrong > 0 && simt::faults() == faults, name, what);
}

template <class Expect>
void race(const char* name, void (*kernel)(const int*, int*, bool), Expect&& expect) {
  race(name, [&](bool right) {
    const Memory in(kThreads), out(kThreads);
    for (int i = 0; i < kThreads; i++) in.values[i] = 1000 + i;
    launch(kernel, in.values, out.values, right);
    cudaStreamSynchronize(stream);
    bool good = true;
    for (int i = 0; i < kThreads; i++) good &= out.values[i] == 1000 + expect(i);
    return good;
  });
}

void races() {
  race("a missing __syncthreads", reverse, [](int i) { return kThreads - 1 - i; });
  race("a missing __syncwarp", reverse_warp, [](int i) { return i ^ 31; });
  race("a missing __syncthreads before the next round", rotate_twice,
       [](int i) { return (i + 2) % kThreads; });
  race("a missing wait for cp.async", copy_by_thread, [](int i) { return i; });
  race("a missing wait for a bulk copy", copy_by_engine, [](int i) { return i; });
  race("a flag before its value", [](bool right) {
    const Memory in(1), out(6);
    in.values[0] = 5;
    for (int i = 0; i < 6; i++) out.values[i] = 0;
    launch(tell, in.values, out.values, right, 2);
    cudaStreamSynchronize(stream);
    return out.values[0] == 5;
  });
  race("a missing wait for the kernel before", [](bool right) {
    const Memory memory(kThreads);
    for (int i = 0; i < kThreads; i++) memory.values[i] = 0;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1), config.blockDim = dim3(kThreads), config.stream = stream;
    config.attrs = &attribute, config.numAttrs = 1;
    for (int i = 0; i < 5; i++) cudaLaunchKernelEx(&config, increment, memory.values, right);
    cudaStreamSynchronize(stream);
    for (int i = 0; i < kThreads; i++)
      if (memory.values[i] != 5) return false;
    return true;
  });
  // The host's own: nothing has run before it waits.
  const Memory memory(kThreads);
  cudaMemset(memory.values, 0, kThreads * sizeof(int));
  tp::launch_kernel({.grid = dim3(1), .block = kThreads, .stream = stream}, increment, memory.values, true);
  const bool early = memory.values[0] == 0;
  cudaStreamSynchronize(stream);
  say(early && memory.values[0] == 1, "a host that does not wait sees nothing", "");
}

void all_faults() {
  simt::quiet(true);
  for (int f = 0; f < kFaults; f++) {
    const Memory in(kThreads), out(kThreads);
    const int before = simt::faults();
    simt::seed(static_cast<uint64_t>(f) + 1);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(3), config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kThreads * sizeof(int);
    config.stream = stream;
    cudaLaunchKernelEx(&config, wrong, static_cast<Fault>(f), in.values, out.values);
    const cudaError_t status = cudaStreamSynchronize(stream);
    const std::string& report = simt::last_fault();
    const bool good = status == cudaErrorLaunchFailure && simt::faults() > before &&
                      report.find(kExpected[f].words) != std::string::npos &&
                      report.find("wrong") != std::string::npos;
    say(good, kExpected[f].name, good ? "" : report.c_str());
    simt::reset();
  }
  simt::quiet(false);
}

/// One seed, one order.
void same_again() {
  uint64_t counts[2];
  std::vector<int> seen[2];
  for (int again = 0; again < 2; again++) {
    simt::seed(4711);
    const uint64_t before = simt::switches();
    for (int i = 0; i < 20; i++) {
      const Memory in(kThreads), out(kThreads);
      for (int t = 0; t < kThreads; t++) in.values[t] = t;
      launch(reverse, in.values, out.values, false);
      cudaStreamSynchronize(stream);
      seen[again].insert(seen[again].end(), out.values, out.values + kThreads);
    }
    counts[again] = simt::switches() - before;
  }
  say(counts[0] == counts[1] && seen[0] == seen[1], "a seed gives the same run again", "");
}

}  // namespace

int main() {
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  races();
  all_faults();
  same_again();
  std::printf("%d bad\n", bad);
  return bad > 0 ? 1 : 0;
}
