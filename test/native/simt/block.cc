// A block: from its threads' first step to what must hold when the last of them ends.
#include "block.h"

#include "barriers.h"
#include "fibers.h"
#include "shared_memory.h"

namespace simt {

Uint3 block_index, block_dim, grid_dim;

namespace {

void end_thread() {
  Block& block = *self->block;
  Warp& warp = *self->warp;
  const uint32_t bit = 1u << self->lane;
  for (uint32_t others = warp.offered; others; others &= others - 1)
    if (const int lane = __builtin_ctz(others); warp.mask[lane] & bit)
      fault("lane %d waits in a warp's collective of mask %08x for lanes that have ended, this one", lane,
            warp.mask[lane]);
  warp.ended |= bit;
  block.live--;
  block.grid->clusters[block.cluster].live--;
  changed();
  thread_ended(block);
  if (block.live == 0) {
    if (!block.bulk.empty())
      fault("the block ends with %zu bulk copies on their way to its shared memory", block.bulk.size());
    look_behind_shared(block);
  }
  end_fiber();
}

void thread_main() {
  self->block->grid->launch.body();
  end_thread();
}

}  // namespace

void begin(Grid& grid, unsigned number) {
  auto block = std::make_unique<Block>();
  const Uint3 g = grid.launch.grid, b = grid.launch.block;
  const unsigned threads = b.x * b.y * b.z;
  block->grid = &grid;
  block->number = number;
  block->cluster = number / grid.launch.cluster;
  block->index = {number % g.x, number / g.x % g.y, number / g.x / g.y};
  block->live = static_cast<int>(threads);
  take_shared(*block);
  block->warps.resize((threads + 31) / 32);
  for (unsigned t = 0; t < threads; t++) {
    Warp& warp = block->warps[t / 32];
    const int lane = static_cast<int>(t % 32);
    warp.block = block.get();
    warp.present |= 1u << lane;
    Fiber& fiber = warp.fibers[lane];
    fiber.thread = {t % b.x, t / b.x % b.y, t / b.x / b.y};
    fiber.block = block.get(), fiber.warp = &warp, fiber.lane = lane;
    prepare(fiber, t, thread_main);
    wake(&fiber);
  }
  grid.clusters[block->cluster].live += static_cast<int>(threads);
  grid.resident.push_back(std::move(block));
  changed();
}

void run(Block& block) {
  enter(&block);
  block_index = block.index, block_dim = block.grid->launch.block, grid_dim = block.grid->launch.grid;
  run_fibers(block);
}

void put_away(Block& block) {
  for (Warp& warp : block.warps)
    for (Fiber& fiber : warp.fibers) give_back_stack(fiber);
  give_back_shared(block);
}

}  // namespace simt
