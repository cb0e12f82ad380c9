// How threads of a block, blocks of the grid and ranks wait for each other. Every wait ends: a kernel that
// hangs costs everyone on the host.
#pragma once

#include "ops/cuda/block.cuh"
#include "ops/cuda/resident/tokens.h"

namespace TP_RESIDENT {

constexpr uint64_t kPeerTimeoutNs = 20'000'000'000;  // a peer that is this late will not come
constexpr uint64_t kTimeoutNs = 25'000'000'000;
constexpr int kTriesBetweenLooks = 1 << 14;  // at the host's memory, which lies behind a slow bus

/// The warp's number, asked of its first lane, so that the compiler knows it to be the same in all lanes.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
}

/// A barrier of the computing (consumer) threads of the block.
__device__ inline void sync_consumers() { ptx::bar_sync<1, kThreads>(); }

/// What the computing threads prepare at the begin of a launch is there for the warp that fills the ring.
__device__ inline void say_prepared() { ptx::bar_arrive<2, kThreads + 32>(); }
__device__ inline void sync_prepared() { ptx::bar_sync<2, kThreads + 32>(); }

/// Ends the kernel when a wait that began at `begin` (0: now) has lasted too long or was called off; returns
/// when it began. Kept out of line: the code of every step should stay in the instruction cache.
__device__ __noinline__ inline uint64_t end_if_overdue(const PeerMemory& peers, uint64_t begin,
                                                       uint64_t limit, int peer) {
  const uint64_t now = ptx::globaltimer();
  const bool off = peers.abort && *peers.abort;
  if (!off && begin == 0) return now;
  if (!off && now - begin < limit) return begin;
  if (!off && peer >= 0 && peers.late) *peers.late = 1 + static_cast<uint32_t>(peer);
  __threadfence_system();
  __trap();
  return begin;
}

/// Counts the tries of a wait.
class Timeout {
 public:
  __device__ __forceinline__ void poll(const PeerMemory& peers, uint64_t limit, int peer = -1) {
    if (++tries_ % kTriesBetweenLooks == 0) begin_ = end_if_overdue(peers, begin_, limit, peer);
  }

 private:
  int tries_ = 0;
  uint64_t begin_ = 0;
};

/// Arrivals of blocks, and how many there must be before this block may go on.
class ArrivalCounter {
 public:
  __device__ ArrivalCounter(uint32_t* arrived, uint32_t before) : arrived_(arrived), due_(before) {}
  /// The block is done; what its threads wrote is visible to whoever awaits it.
  __device__ void arrive() const {
    sync_consumers();
    if (threadIdx.x == 0) ptx::red_release_gpu_add<1>(arrived_);
  }
  __device__ void expect(int blocks) { due_ += static_cast<uint32_t>(blocks); }
  __device__ void wait(const PeerMemory& peers) const {
    if (warp_index() == 0) {
      Timeout timeout;
      while (__any_sync(~0u, static_cast<int>(ptx::ld_acquire_gpu(arrived_) - due_) < 0))
        timeout.poll(peers, kTimeoutNs);
    }
    sync_consumers();
  }
  __device__ uint32_t due() const { return due_; }

 private:
  uint32_t* arrived_;
  uint32_t due_;
};

/// Of the operation before.
__device__ __forceinline__ int turn_before(int turn) { return (turn + kInboxTurns - 1) % kInboxTurns; }

/// As it may travel: not the bits of no value.
__device__ __forceinline__ float value_of(float x) { return bits_of(x) == kNothing ? NAN : x; }

/// Values of kInboxLine neighbouring lanes, the first of which has the first, to every rank, this one
/// included: as elements from `at` on of the operation whose turn it is. By whole warps; lanes that have
/// nothing are not `there`.
__device__ __forceinline__ void push(const PeerMemory& w, int turn, int64_t at, float value, bool there) {
  const float second = __shfl_down_sync(~0u, value, 1), third = __shfl_down_sync(~0u, value, 2),
              fourth = __shfl_down_sync(~0u, value, 3);
  if (!there || threadIdx.x % kInboxLine != 0) return;
  const uint64_t low = static_cast<uint64_t>(bits_of(second)) << 32 | bits_of(value_of(value)),
                 high = static_cast<uint64_t>(bits_of(fourth)) << 32 | bits_of(third);
  const int64_t to = static_cast<int64_t>(turn * w.size + w.rank) * w.floats + at;
#pragma unroll 1
  for (int r = 0; r < w.size; r++) ptx::st_relaxed_sys_b128(w.inbox[r] + to, low, high);
}

/// Empties the first `floats` elements of an operation that all blocks have read, each block its share. A
/// peer may write there again when it has seen what this rank sends three operations on.
__device__ __noinline__ inline void empty(const PeerMemory& w, int turn, int floats) {
  const int lines = floats / kInboxLine;
  const uint4 nothing = make_uint4(kNothing, kNothing, kNothing, kNothing);
#pragma unroll 1
  for (int r = 0; r < w.size; r++) {
    float* const from = w.inbox[w.rank] + static_cast<int64_t>(turn * w.size + r) * w.floats;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x * gridDim.x + blockIdx.x); i < lines;
         i += static_cast<int>(gridDim.x) * kThreads)
      reinterpret_cast<uint4*>(from)[i] = nothing;
  }
}

}  // namespace TP_RESIDENT
