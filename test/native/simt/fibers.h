// Fibers: one stack a CUDA thread, the switch between them, and who runs next.
#pragma once

#include <cstdint>

#include "block.h"

namespace simt {

/// How long nothing has changed that a thread may be waiting for; changed() begins it anew.
struct Stillness {
  uint64_t pauses = 0;
  int leaps = 0;      // of the clock
  bool told = false;  // the host was asked to do something
};
extern Stillness stillness;

uint64_t current_seed();

/// Gives the fiber a stack on which it begins in `main`; `number` is its place in its block.
void prepare(Fiber& fiber, unsigned number, void (*main)());
void give_back_stack(Fiber& fiber);

/// Says that the fiber may run.
inline void wake(Fiber* fiber) {
  Warp& warp = *fiber->warp;
  warp.ready |= 1u << fiber->lane;
  fiber->block->ready |= 1u << (&warp - fiber->block->warps.data());
}

/// Leaves the running thread until somebody wakes it.
void wait_in(const char* what);

/// From the host: lets threads of the block run until it is other blocks' turn.
void run_fibers(Block& block);
/// Leaves the running thread for good, for the next of its block if any is left.
[[noreturn]] void end_fiber();
/// Leaves the running thread, and with it the kernel, for good.
[[noreturn]] void abandon_fiber();

}  // namespace simt
