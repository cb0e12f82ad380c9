// Weights stream through a ring of slots in shared memory: one warp asks the copy engine for what the plan
// will need and runs ahead as far as there is room, across stages and layers; the other warps take slots as
// they need them. A slot holds four weight rows, or parts of them.
#pragma once

#include "ops/cuda/resident/meeting.cuh"

namespace tp::cuda::resident {

__device__ inline uint32_t shared_of(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline void prepare_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// A warp waits until the phase with that parity is over.
__device__ __forceinline__ void await_phase(uint32_t barrier, uint32_t parity, const Wires& wires) {
  Patience patience;
  for (;;) {
    uint32_t over;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    if (__all_sync(~0u, over)) return;
    __nanosleep(32);
    patience.lose(wires, kPatienceNs);
  }
}

/// Sixteen bytes of shared memory, at a 32-bit address and an offset known when compiling.
__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at));
  return x;
}

/// The same, or zeros: lanes without a token ask for nothing.
__device__ __forceinline__ uint4 load_shared(uint32_t at, bool held) {
  uint4 x;
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0; "
      "@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "r"(at), "r"(static_cast<uint32_t>(held)));
  return x;
}

/// Bytes from one to the next: 64 past a multiple of 128, so that neighbours lie on other banks.
inline __host__ __device__ int stride_of(int bytes) { return (bytes + 63) / 128 * 128 + 64; }

/// A matrix cut for the ring: units of 8 rows, dealt out to the blocks in turn from block `offset` on. A
/// portion is 8 rows as the ring holds them; long rows make a unit of several portions.
struct Deal {
  int first, step, parts;  // the block's first unit, how far apart its units are, and portions of a unit
  int units, portions;     // that the block has
  __device__ Deal(int all, int parts_, int offset) : step(gridDim.x), parts(parts_) {
    first = static_cast<int>(blockIdx.x) - offset % step;
    if (first < 0) first += step;
    units = first < all ? (all - 1 - first) / step + 1 : 0;
    portions = units * parts;
  }
  __device__ int unit(int local) const { return first + local * step; }
};

/// Two barriers a slot: its bytes are there; all warps are done with it. A row's place in its slot depends on
/// its length.
class Ring {
 public:
  __device__ Ring(const Parameters& p, char* data, uint64_t* barriers)
      : data_(shared_of(data)), barriers_(shared_of(barriers)), slots_(p.slots), bytes_(p.slot_bytes) {}

  __device__ void prepare() const {
#pragma unroll 1
    for (uint32_t i = 0; i < slots_; i++) {
      prepare_barrier(barriers_ + i * 16, 1);
      prepare_barrier(barriers_ + i * 16 + 8, kWarps);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  /// Shared address of row `row` of the next portion, when all of the portion is there.
  __device__ __forceinline__ uint32_t take(int row, int row_bytes, const Wires& wires) const {
    // One warp polls, the others sleep: polls take from what the copy engine needs to write.
    if (threadIdx.x < 32)
#pragma unroll
      for (int i = 0; i < kUnitSlots; i++) await_phase(barriers_ + spot(i).slot * 16, spot(i).phase, wires);
    asm volatile("bar.sync 2, %0;" ::"n"(kThreads) : "memory");
    return data_ + spot(row / kSlotRows).slot * bytes_ + row % kSlotRows * row_bytes;
  }
  /// The warp is done with the next portion, and goes on to the one behind it.
  __device__ __forceinline__ void release() {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if (lane < kUnitSlots) arrive_at(barriers_ + spot(lane).slot * 16 + 8);
    advance();
  }
  __device__ __forceinline__ void advance() {
    at_ += kUnitSlots;
    if (at_ >= slots_) at_ -= slots_, phase_ ^= 1;
  }

  /// By the warp that fills, for the next portion: lane r brings row r, from `from` on; null: no row.
  /// Adjacent: rows that share a slot are neighbours in memory.
  __device__ __forceinline__ void ask(const Bf16* from, int row_bytes, bool adjacent, const Wires& wires,
                                      uint64_t policy) {
    const int lane = threadIdx.x % 32;
    const unsigned rows = __ballot_sync(~0u, lane < kUnitRows && from != nullptr);
#pragma unroll
    for (int i = 0; i < kUnitSlots; i++) {
      const Spot s = spot(i);
      const uint32_t full = barriers_ + s.slot * 16;
      const int r = lane - i * kSlotRows;
      await_phase(full + 8, s.phase ^ 1, wires);
      if (asked_ == kSlotsAhead) {
        await_phase(barriers_ + late_ * 16, late_phase_, wires);
        if (++late_ == slots_) late_ = 0, late_phase_ ^= 1;
      } else {
        asked_++;
      }
      if (r == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(full),
                     "r"(row_bytes * __popc(rows >> i * kSlotRows & ((1 << kSlotRows) - 1)))
                     : "memory");
      __syncwarp();
      if (r >= 0 && r < (adjacent ? 1 : kSlotRows) && (rows >> lane & 1))
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
            "%2, [%3], "
            "%4;" ::"r"(data_ + s.slot * bytes_ + r * row_bytes),
            "l"(from), "r"(adjacent ? kSlotRows * row_bytes : row_bytes), "r"(full), "l"(policy)
            : "memory");
    }
    advance();
  }

 private:
  struct Spot {
    uint32_t slot, phase;
  };
  __device__ __forceinline__ Spot spot(int ahead) const {
    const uint32_t slot = at_ + ahead;
    return slot < slots_ ? Spot{slot, phase_} : Spot{slot - slots_, phase_ ^ 1};
  }

  uint32_t data_, barriers_, slots_, bytes_, at_ = 0, phase_ = 0;
  int asked_ = 0;                       // by the warp that fills, up to kSlotsAhead
  uint32_t late_ = 0, late_phase_ = 0;  // the oldest slot whose bytes may be on their way
};

}  // namespace tp::cuda::resident
