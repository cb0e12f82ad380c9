// All-reduce and all-gather between GPUs of one host by pushing. Every rank writes its values straight into
// an inbox in each peer's memory, in lines of 16 bytes that carry three floats and the number of the
// operation: a line is valid when its number is right, so there is no flag, no fence and no barrier. Every
// rank then adds all ranks' values in tree order and gets the same bits.
//
// Two sets of inboxes take turns. A rank that starts operation e has seen every peer's lines of e - 1, which
// a peer writes only after it is done with e - 2, so the inbox of e - 2 may be overwritten.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/launch.cuh"
#include "base/ptx.cuh"
#include "base/tree.h"
#include "comm/collective.h"

namespace tp {

namespace {

constexpr int kMaxRanks = kMaxLeaves;
constexpr int kLineFloats = 3;
constexpr int kThreads = 256;
constexpr int kMostBlocks = 128;  // all resident at once, so that no block waits for one that cannot start
/// Between looks at what lies in the host's memory: thousands of threads that look often keep the bus busy
/// for tens of milliseconds.
constexpr uint32_t kTriesBetweenLooks = 1 << 16;
constexpr uint64_t kTimeoutNs = 20'000'000'000;  // a peer that is this late will not come

/// Written by the device, read by the host, and the other way round: pinned host memory.
struct Shared {
  volatile uint32_t abort;  // host -> device: stop waiting
  volatile uint32_t late;   // device -> host: 1 + the rank that did not arrive
};

struct Inboxes {
  uint4* of[kMaxRanks];  // of[r]: rank r's inbox, (2, size, lines)
  uint32_t* epoch;       // operations done; this rank's own memory
  uint32_t* finished;    // blocks of the current operation that are done
  Shared* shared;
  int64_t lines;  // of one message at most
  int rank, size;
};

// One 128-bit access is indivisible; four 32-bit ones would not be.
__device__ __forceinline__ void push_line(uint4* to, uint4 line) {
  const uint64_t low = line.x | static_cast<uint64_t>(line.y) << 32,
                 high = line.z | static_cast<uint64_t>(line.w) << 32;
  ptx::st_relaxed_sys_b128(to, low, high);
}

__device__ __forceinline__ uint4 peek_line(const uint4* from) {
  uint64_t low, high;
  ptx::ld_relaxed_sys_b128(low, high, from);
  return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
          static_cast<uint32_t>(high >> 32)};
}

/// Waits for the line of operation `epoch`. Gives up when told to, or after a while: a GPU that
/// hangs costs everyone on the host.
__device__ __forceinline__ uint4 await_line(const Inboxes& in, const uint4* from, uint32_t epoch, int peer) {
  uint4 line = peek_line(from);
  if (line.w == epoch) return line;
  const uint64_t start = ptx::globaltimer();
  for (uint32_t tries = 1;; tries++) {
    line = peek_line(from);
    if (line.w == epoch) return line;
    if (tries % kTriesBetweenLooks) continue;
    if (in.shared->abort || in.shared->late) return line;
    if (ptx::globaltimer() - start > kTimeoutNs) {
      in.shared->late = 1 + static_cast<uint32_t>(peer);
      return line;
    }
  }
}

__device__ __forceinline__ uint4* inbox(const Inboxes& in, int owner, int sender, uint32_t epoch) {
  return in.of[owner] + (static_cast<int64_t>(epoch & 1) * in.size + sender) * in.lines;
}

__device__ __forceinline__ void load_line(const float* from, int64_t line, int64_t floats,
                                          float (&v)[kLineFloats]) {
  for (int i = 0; i < kLineFloats; i++)
    v[i] = line * kLineFloats + i < floats ? from[line * kLineFloats + i] : 0.0f;
}

__device__ __forceinline__ void store_line(float* to, int64_t line, int64_t floats,
                                           const float (&v)[kLineFloats]) {
  for (int i = 0; i < kLineFloats; i++)
    if (line * kLineFloats + i < floats) to[line * kLineFloats + i] = v[i];
}

__device__ __forceinline__ void push(const Inboxes& in, int64_t line, const float (&v)[kLineFloats],
                                     uint32_t epoch) {
  const uint4 packed = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), epoch};
  for (int peer = 0; peer < in.size; peer++)
    if (peer != in.rank) push_line(inbox(in, peer, in.rank, epoch) + line, packed);
}

/// The number of this operation. Kernels on both sides overlap with this one, up to here and up to theirs.
__device__ __forceinline__ uint32_t begin(const Inboxes& in) {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  return *in.epoch + 1;
}

/// The last block to end counts the operation; all blocks have read the epoch by then.
__device__ __forceinline__ void finish(const Inboxes& in, uint32_t epoch) {
  __syncthreads();
  if (threadIdx.x > 0) return;
  __threadfence();
  if (atomicAdd(in.finished, 1u) != gridDim.x - 1) return;
  *in.finished = 0;
  *in.epoch = epoch;
}

// buffer: (floats) in and out.
template <int N>
__global__ void __launch_bounds__(kThreads)
    all_reduce_kernel(const __grid_constant__ Inboxes in, float* buffer, int64_t floats) {
  const uint32_t epoch = begin(in);
  const int64_t lines = (floats + kLineFloats - 1) / kLineFloats;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                step = int64_t{gridDim.x} * kThreads;
  for (int64_t line = first; line < lines; line += step) {
    float own[kLineFloats];
    load_line(buffer, line, floats, own);
    push(in, line, own, epoch);
  }
  for (int64_t line = first; line < lines; line += step) {
    float values[kLineFloats][N], own[kLineFloats];
    load_line(buffer, line, floats, own);
#pragma unroll
    for (int r = 0; r < N; r++) {
      uint4 got = {__float_as_uint(own[0]), __float_as_uint(own[1]), __float_as_uint(own[2]), epoch};
      if (r != in.rank) got = await_line(in, inbox(in, in.rank, r, epoch) + line, epoch, r);
      values[0][r] = __uint_as_float(got.x);
      values[1][r] = __uint_as_float(got.y);
      values[2][r] = __uint_as_float(got.z);
    }
    float sum[kLineFloats];
#pragma unroll
    for (int i = 0; i < kLineFloats; i++) sum[i] = tree_sum(values[i], N);
    store_line(buffer, line, floats, sum);
  }
  finish(in, epoch);
}

// send: (floats); gathered: (size, floats).
__global__ void __launch_bounds__(kThreads)
    all_gather_kernel(const __grid_constant__ Inboxes in, const float* send, float* gathered,
                      int64_t floats) {
  const uint32_t epoch = begin(in);
  const int64_t lines = (floats + kLineFloats - 1) / kLineFloats;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                step = int64_t{gridDim.x} * kThreads;
  for (int64_t line = first; line < lines; line += step) {
    float own[kLineFloats];
    load_line(send, line, floats, own);
    push(in, line, own, epoch);
    store_line(gathered + in.rank * floats, line, floats, own);
  }
  for (int64_t line = first; line < lines; line += step) {
    for (int r = 0; r < in.size; r++) {
      if (r == in.rank) continue;
      const uint4 got = await_line(in, inbox(in, in.rank, r, epoch) + line, epoch, r);
      const float values[kLineFloats] = {__uint_as_float(got.x), __uint_as_float(got.y),
                                         __uint_as_float(got.z)};
      store_line(gathered + r * floats, line, floats, values);
    }
  }
  finish(in, epoch);
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail("TP_COLLECTIVE", "peer: %s: %s", what, cudaGetErrorString(status));
}

class Peer final : public DeviceCollective {
 public:
  Peer(int rank, int size, int64_t max_floats) {
    if (size < 2 || size > kMaxRanks || (size & (size - 1)))
      fail("TP_COLLECTIVE", "peer joins 2, 4 or 8 ranks, not %d", size);
    in_.rank = rank;
    in_.size = size;
    in_.lines = (max_floats + kLineFloats - 1) / kLineFloats;
    peers_.rank = rank;
    peers_.size = size;
    peers_.floats = (max_floats + kInboxLine - 1) / kInboxLine * kInboxLine;
    // Behind the lines of this file's kernels, those of kernels that sum by themselves.
    check(cudaMalloc(&in_.of[rank], line_bytes() + peers_.inbox_bytes()), "inbox");
    check(cudaMemset(in_.of[rank], 0, line_bytes()), "inbox");
    check(cudaMemset(behind_lines(in_.of[rank]), kNothingByte, peers_.inbox_bytes()), "inbox");
    check(cudaMalloc(&in_.epoch, 2 * sizeof(uint32_t)), "epoch");
    check(cudaMemset(in_.epoch, 0, 2 * sizeof(uint32_t)), "epoch");
    in_.finished = in_.epoch + 1;
    check(cudaHostAlloc(&shared_, sizeof(Shared), cudaHostAllocMapped), "abort flag");
    shared_->abort = 0;
    shared_->late = 0;
    check(cudaHostGetDevicePointer(&in_.shared, shared_, 0), "abort flag");
    peers_.abort = &in_.shared->abort;
    peers_.late = &in_.shared->late;
    peers_.inbox[rank] = behind_lines(in_.of[rank]);
    check(cudaDeviceSynchronize(), "inbox");  // cleared before anyone may push
  }

  ~Peer() override {
    abort();
    cudaDeviceSynchronize();
    for (int r = 0; r < in_.size; r++)
      if (r != in_.rank && in_.of[r]) cudaIpcCloseMemHandle(in_.of[r]);
    cudaFree(in_.of[in_.rank]);
    cudaFree(in_.epoch);
    cudaFreeHost(shared_);
  }

  std::vector<uint8_t> hello() const override {
    cudaIpcMemHandle_t handle;
    check(cudaIpcGetMemHandle(&handle, in_.of[in_.rank]), "CUDA IPC handle");
    std::vector<uint8_t> bytes(sizeof handle);
    memcpy(bytes.data(), &handle, sizeof handle);
    return bytes;
  }

  void connect(const std::vector<std::vector<uint8_t>>& hellos, double) override {
    if (static_cast<int>(hellos.size()) != in_.size)
      fail("TP_COLLECTIVE", "peer: %zu handles for %d ranks", hellos.size(), in_.size);
    for (int r = 0; r < in_.size; r++) {
      if (r == in_.rank) continue;
      cudaIpcMemHandle_t handle;
      if (hellos[r].size() != sizeof handle)
        fail("TP_COLLECTIVE", "peer: rank %d sent %zu bytes as its handle", r, hellos[r].size());
      memcpy(&handle, hellos[r].data(), sizeof handle);
      void* memory = nullptr;
      check(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess), "opening a peer's memory");
      in_.of[r] = static_cast<uint4*>(memory);
      peers_.inbox[r] = behind_lines(in_.of[r]);
    }
  }

  const PeerMemory* peers() const override { return &peers_; }

  void all_reduce(float* buffer, int64_t floats, Stream on) override {
    const int blocks = blocks_for(floats);
    if (blocks == 0) return;
    const auto kernel = in_.size == 2   ? all_reduce_kernel<2>
                        : in_.size == 4 ? all_reduce_kernel<4>
                                        : all_reduce_kernel<8>;
    check(launch_kernel(with(blocks, on), kernel, in_, buffer, floats), "all-reduce");
  }

  void all_gather(const float* send, float* gathered, int64_t floats, Stream on) override {
    const int blocks = blocks_for(floats);
    if (blocks == 0) return;
    check(launch_kernel(with(blocks, on), all_gather_kernel, in_, send, gathered, floats), "all-gather");
  }

  void abort() override { shared_->abort = 1; }

  std::string error() const override {
    if (shared_->abort) return "peer: told to stop waiting";
    const uint32_t late = shared_->late;
    return late ? "peer: rank " + std::to_string(late - 1) + " did not arrive within 20 s" : "";
  }

 private:
  int blocks_for(int64_t floats) const {
    const int64_t lines = (floats + kLineFloats - 1) / kLineFloats;
    if (lines > in_.lines)
      fail("TP_COLLECTIVE", "peer: %lld floats, room for %lld", static_cast<long long>(floats),
           static_cast<long long>(in_.lines * kLineFloats));
    return static_cast<int>(std::min<int64_t>((lines + kThreads - 1) / kThreads, kMostBlocks));
  }

  static Launch with(int blocks, Stream on) {
    return {.grid = dim3(static_cast<unsigned>(blocks)),
            .block = kThreads,
            .stream = static_cast<cudaStream_t>(on),
            .overlap = true};
  }

  size_t line_bytes() const { return size_t{2} * in_.size * in_.lines * sizeof(uint4); }
  float* behind_lines(uint4* inboxes) const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(inboxes) + line_bytes());
  }

  Inboxes in_{};
  PeerMemory peers_{};
  Shared* shared_ = nullptr;
};

}  // namespace

std::unique_ptr<DeviceCollective> make_peer(int rank, int size, int64_t max_floats) {
  return std::make_unique<Peer>(rank, size, max_floats);
}

}  // namespace tp
