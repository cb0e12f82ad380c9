// Weights, keys and values stream through a ring of slots in shared memory: one warp asks the copy engine for
// what the plan will need and runs ahead as far as there is room, across stages and layers; the other warps
// take slots as they need them. A slot holds four weight rows, or parts of them, or a tile's keys or values.
#pragma once

#include "ops/cuda/resident/sync.cuh"

namespace TP_RESIDENT {

/// A warp waits until the phase with that parity is over.
__device__ __forceinline__ void wait_phase(uint32_t barrier, uint32_t parity, const PeerMemory& peers) {
  for (Timeout timeout; !__all_sync(~0u, ptx::mbarrier_try_wait(barrier, parity));)
    timeout.poll(peers, kTimeoutNs);
}

/// Bytes from one to the next: 64 past a multiple of 128, so that neighbours lie on other banks.
inline __host__ __device__ int stride_of(int bytes) { return (bytes + 63) / 128 * 128 + 64; }

/// A matrix cut for the ring: units of 8 rows, dealt out to the blocks in turn from block `offset` on. A
/// portion is 8 rows as the ring holds them; long rows make a unit of several portions.
struct Schedule {
  int first, step, units;          // the block's first unit, how far apart its units are, and their number
  int parts = 1;                   // portions of a unit
  int first_drawn = 0, drawn = 0;  // units that are not dealt: blocks take the next as they come to it
  __device__ Schedule(int first_, int step_, int units_) : first(first_), step(step_), units(units_) {}
  __device__ Schedule(const Parameters& p, int all, int parts_, int offset = 0)
      : step(static_cast<int>(gridDim.x)), parts(parts_) {
    first = static_cast<int>(blockIdx.x) - (offset - p.by_blocks.of(offset) * step);
    if (first < 0) first += step;
    units = first < all ? p.by_blocks.of(all - 1 - first) + 1 : 0;
  }
  /// Of many units the last are drawn: some multiprocessors read a twentieth slower than others, and all
  /// would wait for them.
  static __device__ Schedule drawing(const Parameters& p, int all, int offset = 0) {
    Schedule s(p, all, 1, offset);
    const int rounds = p.by_blocks.of(all), dealt = rounds - 1 - rounds / 8;
    if (dealt > 1) s.units = dealt, s.first_drawn = dealt * s.step, s.drawn = all - s.first_drawn;
    return s;
  }
  __device__ int portions() const { return units * parts; }
  __device__ int unit(int local) const { return first + local * step; }
};

/// The units of a schedule that are drawn, by a warp. A ticket takes a while, so it is asked for while the
/// unit before is brought. A block asks until it gets none: so all know how many tickets a schedule takes.
class Draw {
 public:
  /// `before`: tickets that the launch's schedules took until now, with this one's then.
  __device__ Draw(const Parameters& p, const Schedule& schedule, uint32_t& before)
      : first_(schedule.first_drawn),
        drawn_(schedule.drawn),
        before_(before),
        tickets_(&p.counters->tickets) {
    if (drawn_ > 0) before += static_cast<uint32_t>(drawn_) + gridDim.x;
  }
  /// Of the block's n-th unit, while it knows of `units`: whether there is one behind these, and if it is the
  /// next, which.
  __device__ __forceinline__ void look_ahead(int n, int& units, int& next) {
    if (drawn_ == 0 || n + 2 < units) return;
    if (n + 1 == units) {
      const uint32_t ticket = __shfl_sync(~0u, ticket_, 0) - before_;
      next = first_ + static_cast<int>(ticket);
      // A vote tells the compiler that the warp stays together.
      if (!__any_sync(~0u, ticket < static_cast<uint32_t>(drawn_))) return;
      units++;
    }
    if (threadIdx.x % 32 == 0) ticket_ = atomicAdd(tickets_, 1u);
  }

 private:
  const int first_, drawn_;
  const uint32_t before_;
  uint32_t* const tickets_;
  uint32_t ticket_ = 0;
};

/// A portion's unit; the complement of the last of a stage.
struct UnitName {
  int name;
  __device__ int unit() const { return name < 0 ? ~name : name; }
  __device__ bool last() const { return name < 0; }
};

/// How far a user of the ring has come.
struct RingAt {
  uint32_t slot = 0, phase = 0;
};

/// Of two barriers a slot, and names of units in two turns.
constexpr int kRingWords = 3 * kMostSlots;

/// As the warps see it that take what is there. Two barriers a slot: its bytes are there; all warps are done
/// with it. A row's place in its slot depends on its length.
class Ring {
 public:
  __device__ Ring(const Parameters& p, char* data, uint64_t* barriers)
      : memory_(data),
        data_(ptx::shared_address(data)),
        barriers_(ptx::shared_address(barriers)),
        slots_(p.slots),
        bytes_(p.slot_bytes) {}

  __device__ void prepare() const {
#pragma unroll 1
    for (uint32_t i = 0; i < slots_; i++) {
      ptx::mbarrier_init<1>(barriers_ + i * 16);
      ptx::mbarrier_init<kWarps>(barriers_ + i * 16 + 8);
    }
    ptx::fence_proxy_async();
  }
  /// Until the next portion is there: each warp for itself. All lanes ask for the same barrier, which is one
  /// question; to ask for several at once takes as long as to ask one after the other.
  __device__ __forceinline__ void wait_full(const PeerMemory& peers) const {
    const RingAt first = spot(0), second = spot(1);
    static_assert(kUnitSlots == 2);
    for (Timeout timeout;; timeout.poll(peers, kTimeoutNs)) {
      const uint32_t there = ptx::mbarrier_try_wait(barriers_ + first.slot * 16, first.phase) &
                             ptx::mbarrier_try_wait(barriers_ + second.slot * 16, second.phase);
      if (__all_sync(~0u, there)) return;
    }
  }
  /// Slot i of the next portion.
  __device__ __forceinline__ char* data(int i) const { return memory_ + spot(i).slot * bytes_; }
  /// Shared address of row `row` of the next portion.
  __device__ __forceinline__ uint32_t row(int row, int row_bytes) const {
    return data_ + spot(row / kSlotRows).slot * bytes_ + row % kSlotRows * row_bytes;
  }
  /// The warp is done with the next portion, and goes on to the one behind it.
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < kUnitSlots; i++) ptx::mbarrier_arrive(barriers_ + spot(i).slot * 16 + 8);
    at_ = spot(kUnitSlots);
  }
  /// Of the next portion, and whether it is the last of its stage.
  __device__ __forceinline__ UnitName unit() const { return {static_cast<int>(ptx::ld_shared(name()))}; }
  __device__ RingAt at() const { return at_; }
  __device__ void go_to(RingAt at) { at_ = at; }

 protected:
  /// Where the next portion's unit stands. Two turns of the ring: what is read now is not overwritten by what
  /// will lie in the same slots.
  __device__ __forceinline__ uint32_t name() const {
    return barriers_ + kMostSlots * 16 + (at_.phase * kMostSlots + at_.slot) * 4;
  }
  __device__ __forceinline__ RingAt spot(int ahead) const {
    const uint32_t slot = at_.slot + ahead;
    return slot < slots_ ? RingAt{slot, at_.phase} : RingAt{slot - slots_, at_.phase ^ 1};
  }

  char* memory_;
  uint32_t data_, barriers_, slots_, bytes_;
  RingAt at_;
};

/// As the warp sees it that fills the ring.
class RingFiller : Ring {
 public:
  __device__ explicit RingFiller(const Ring& ring) : Ring(ring) {}

  /// Says which unit the next portion is of.
  __device__ __forceinline__ void announce(int unit, bool last) const {
    if (threadIdx.x % 32 == 0) ptx::st_shared(name(), static_cast<uint32_t>(last ? ~unit : unit));
  }
  /// The next portion: lane r brings row r, `bytes` from `from` on, to `offset` in its slot; null: no row.
  /// Waits until no more than `ahead` bytes are on their way with it, or no other slot.
  __device__ __forceinline__ void produce(const Bf16* from, int bytes, int offset, int ahead,
                                          const PeerMemory& peers, uint64_t policy) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < kUnitSlots; i++) {
      const uint32_t full = barriers_ + at_.slot * 16;
      const int r = lane - i * kSlotRows;
      const bool here = from != nullptr && r >= 0 && r < kSlotRows;
      const int of_slot = __reduce_add_sync(~0u, here ? bytes : 0);
      wait_phase(full + 8, at_.phase ^ 1, peers);
      if (coming_ == 0) late_ = at_;
      while (coming_ > 0 && (late_.slot == at_.slot || coming_ + of_slot > ahead)) {
        wait_phase(barriers_ + late_.slot * 16, late_.phase, peers);
        coming_ -= __shfl_sync(~0u, asked_, static_cast<int>(late_.slot));
        if (++late_.slot == slots_) late_ = {0, late_.phase ^ 1};
      }
      coming_ += of_slot;
      if (lane == static_cast<int>(at_.slot)) asked_ = of_slot;
      if (r == 0) ptx::mbarrier_arrive_expect_tx(full, of_slot);
      __syncwarp();
      if (here) ptx::cp_async_bulk(data_ + at_.slot * bytes_ + offset, from, bytes, full, policy);
      at_ = spot(1);
    }
  }

 private:
  // Bytes that may be on their way, and of them those for the slot of the lane's number; the first slot that
  // waits for some.
  int coming_ = 0, asked_ = 0;
  RingAt late_;
};

}  // namespace TP_RESIDENT
