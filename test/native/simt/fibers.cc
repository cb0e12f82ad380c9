// The way from pause() or wait_in() to the next thread is all in this file, to be inlined: it is gone tens of
// millions of times a check.
#include "fibers.h"

#include "copies.h"
#include "guarded_pool.h"

namespace simt {

Fiber* self = nullptr;
Stillness stillness;

namespace {

constexpr size_t kStack = 64 << 10;

uint64_t seed_ = 1, state_ = 0x9e3779b97f4a7c15u, switches_ = 0;
int budget_ = 0;  // switches until other blocks get a turn
void* host_stack_ = nullptr;
GuardedPool stacks_(kStack, GuardedPool::Guard::before);  // stacks grow down

// Saves what a call must preserve and the stack pointer, and returns on the other stack.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

int pick_bit(uint32_t bits) {
  const int turn = static_cast<int>(draw() >> 40) & 31;
  const uint32_t turned = bits >> turn | (turn ? bits << (32 - turn) : 0);
  return (__builtin_ctz(turned) + turn) & 31;
}

/// The next thread of a block: mostly another lane of the same warp. Null: other blocks' turn. Now and then a
/// copy lands on the way.
Fiber* pick(Block& block, Warp* warp) {
  if (--budget_ <= 0) return nullptr;
  const uint64_t chance = draw() >> 32;
  if (chance % 64 == 0) land_one(block);
  if (!block.ready) return nullptr;
  if (!warp || !warp->ready || (chance & 0x7c0) == 0)
    warp = &block.warps[static_cast<size_t>(pick_bit(block.ready))];
  const int lane = pick_bit(warp->ready);
  warp->ready &= ~(1u << lane);
  if (!warp->ready) block.ready &= ~(1u << (warp - block.warps.data()));
  return &warp->fibers[lane];
}

/// Null: to the host.
void switch_to(Fiber* to, void** save) {
  self = to;
  simt_switch(save, to ? to->stack_pointer : host_stack_);
}

[[noreturn]] void switch_for_good(Fiber* to) {
  void* nowhere;
  switch_to(to, &nowhere);
  __builtin_unreachable();
}

/// Leaves the running thread, which has said what it waits for or is ready to go on.
void leave() {
  Fiber* const me = self;
  Fiber* const to = pick(*me->block, me->warp);
  if (to == me) return;
  switches_++;
  switch_to(to, &me->stack_pointer);
}

}  // namespace

uint64_t draw() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return state_;
}
void seed(uint64_t value) {
  seed_ = value;
  state_ = value * 0x9e3779b97f4a7c15u + 0x1234567u;
  for (int i = 0; i < 8; i++) draw();
}
uint64_t current_seed() { return seed_; }
uint64_t switches() { return switches_; }

void prepare(Fiber& fiber, unsigned number, void (*main)()) {
  fiber.waits = "not begun";
  fiber.stack = stacks_.take();
  // Not all stacks begin in the same sets of the cache.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack + kPage - number * 37 % 64 * 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(main);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // registers
  fiber.stack_pointer = top;
}
void give_back_stack(Fiber& fiber) {
  if (!fiber.stack) return;
  stacks_.give_back(fiber.stack);
  fiber.stack = nullptr;
}

void wait_in(const char* what) {
  self->waits = what;
  leave();
}
void pause() {
  stillness.pauses++;
  wake(self);
  leave();
}
void maybe_pause() {
  if (draw() >> 60) return;
  wake(self);
  leave();
}
void changed() { stillness = {}; }

void run_fibers(Block& block) {
  budget_ = 1 + static_cast<int>(draw(draw(4) ? 64 : 4096));
  Fiber* const to = pick(block, nullptr);
  if (!to) return;
  switches_++;
  switch_to(to, &host_stack_);
}
void end_fiber() { switch_for_good(self->block->live == 0 ? nullptr : pick(*self->block, self->warp)); }
void abandon_fiber() { switch_for_good(nullptr); }

}  // namespace simt
