#include "mbarrier.h"

#include "fibers.h"
#include "shared_memory.h"

namespace simt {

namespace {

struct Mbarrier {
  uint16_t arrivals, pending;
  int32_t bytes_and_phase;  // bytes to come * 2 + parity of the phase under way
};

Mbarrier& mbarrier_at(uint32_t address) {
  if (address % 8) fault("mbarrier at %08x: not at a multiple of 8", address);
  auto& barrier = *reinterpret_cast<Mbarrier*>(room_at(address, 8));
  if (barrier.arrivals == 0 || barrier.arrivals == 0xffff)
    fault("mbarrier at %08x: not initialised", address);
  return barrier;
}

/// Where the phase is over, begins the next and wakes those that waited for that.
void look_whether_over(Block& block, uint32_t address, Mbarrier& barrier) {
  changed();
  if (barrier.pending != 0 || barrier.bytes_and_phase >> 1 != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.bytes_and_phase ^= 1;
  auto& sleepers = block.sleepers;
  for (size_t i = 0; i < sleepers.size();)
    if (sleepers[i].barrier == address) {
      wake(sleepers[i].fiber);
      sleepers[i] = sleepers.back();
      sleepers.pop_back();
    } else {
      i++;
    }
}

}  // namespace

void look_for_mbarrier(uint32_t address) { mbarrier_at(address); }

void arrive(Block& block, uint32_t address, int bytes) {
  Mbarrier& barrier = mbarrier_at(address);
  if (barrier.pending == 0) fault("mbarrier at %08x: more than its %d arrivals", address, barrier.arrivals);
  barrier.pending--;
  barrier.bytes_and_phase += 2 * bytes;
  look_whether_over(block, address, barrier);
}

void bring(Block& block, uint32_t address, int bytes) {
  Mbarrier& barrier = mbarrier_at(address);
  barrier.bytes_and_phase -= 2 * bytes;
  look_whether_over(block, address, barrier);
}

void mbarrier_init(uint32_t barrier, int arrivals) {
  self->where = __builtin_return_address(0);
  if (barrier % 8) fault("mbarrier at %08x: not at a multiple of 8", barrier);
  if (arrivals <= 0 || arrivals >= 0xffff) fault("mbarrier of %d arrivals", arrivals);
  *reinterpret_cast<Mbarrier*>(room_at(barrier, 8)) = {static_cast<uint16_t>(arrivals),
                                                       static_cast<uint16_t>(arrivals), 0};
}
void mbarrier_arrive(uint32_t barrier, int bytes) {
  self->where = __builtin_return_address(0);
  maybe_pause();
  arrive(*self->block, barrier, bytes);
}
bool mbarrier_test_wait(uint32_t address, uint32_t parity) {
  self->where = __builtin_return_address(0);
  return static_cast<uint32_t>(mbarrier_at(address).bytes_and_phase & 1) != (parity & 1);
}
bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  if (mbarrier_test_wait(address, parity)) return true;
  self->where = __builtin_return_address(0);
  if (draw(16) == 0) {
    pause();
  } else {
    self->block->sleepers.push_back({self, address, parity});
    wait_in("an mbarrier");
  }
  return mbarrier_test_wait(address, parity);
}

}  // namespace simt
