// How threads of a block, blocks of the grid and ranks wait for each other. Every wait ends: a kernel that
// hangs costs everyone on the host.
#pragma once

#include "ops/cuda/block.cuh"
#include "ops/cuda/resident/step.h"

namespace tp::cuda::resident {

constexpr uint64_t kPeerPatienceNs = 20'000'000'000;  // a peer that is this late will not come
constexpr uint64_t kPatienceNs = 25'000'000'000;
constexpr int kTriesBetweenLooks = 1 << 14;  // at the host's memory, which lies behind a slow bus

/// The computing threads of the block meet.
__device__ inline void meet() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

__device__ inline uint64_t now_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

/// Ends the kernel when a wait that began at `begin` has lasted too long or was called off. Kept out of line:
/// the code of every step should stay in the instruction cache.
__device__ __noinline__ inline void lose_patience(const Wires& wires, uint64_t& begin, uint64_t limit,
                                                  int peer) {
  const uint64_t now = now_ns();
  if (begin == 0) begin = now;
  const bool off = wires.abort && *wires.abort;
  if (!off && now - begin < limit) return;
  if (!off && peer >= 0 && wires.late) *wires.late = 1 + static_cast<uint32_t>(peer);
  __threadfence_system();
  __trap();
}

/// Counts the tries of a wait.
class Patience {
 public:
  __device__ void lose(const Wires& wires, uint64_t limit, int peer = -1) {
    if (++tries_ % kTriesBetweenLooks == 0) lose_patience(wires, begin_, limit, peer);
  }

 private:
  int tries_ = 0;
  uint64_t begin_ = 0;
};

/// Arrivals of blocks, and how many there must be before this block may go on.
class Counter {
 public:
  __device__ Counter(uint32_t* arrived, uint32_t before) : arrived_(arrived), due_(before) {}
  /// The block is done; what its threads wrote is visible to whoever awaits it.
  __device__ void arrive() const {
    meet();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived_) : "memory");
  }
  __device__ void expect(int blocks) { due_ += static_cast<uint32_t>(blocks); }
  __device__ void await(const Wires& wires) const {
    if (threadIdx.x == 0) {
      Patience patience;
      uint32_t now;
      for (;;) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived_) : "memory");
        if (static_cast<int>(now - due_) >= 0) break;
        patience.lose(wires, kPatienceNs);
      }
    }
    meet();
  }
  __device__ uint32_t due() const { return due_; }

 private:
  uint32_t* arrived_;
  uint32_t due_;
};

/// A value to every rank, this one included, as element `at` of operation `epoch`.
__device__ inline void push(const Wires& w, uint32_t epoch, int64_t at, float value) {
  const uint64_t line = static_cast<uint64_t>(epoch) << 32 | bits_of(value);
  const int64_t to = ((epoch & 1) * w.size + w.rank) * w.floats + at;
#pragma unroll 1
  for (int r = 0; r < w.size; r++)
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(w.inbox[r] + to), "l"(line) : "memory");
}

}  // namespace tp::cuda::resident
