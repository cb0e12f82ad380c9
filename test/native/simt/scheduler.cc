// Grids: which of their blocks are resident, whose turn it is, and what happens when nobody gets on.
#include "scheduler.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "block.h"
#include "copies.h"
#include "fault.h"
#include "fibers.h"
#include "peer_memory.h"
#include "shared_memory.h"

namespace simt {

namespace {

/// When nobody gets on, this much time passes at once, so that kernels that have patience lose it: not so
/// much that of two waits the one with the later limit could be the first to look at the clock.
constexpr uint64_t kLeapNs = 200'000;
constexpr int kMostLeaps = 1'000'000;
constexpr double kMostSeconds = 300;  // of one wait of the host for the device

uint64_t clock_ = 1'000'000'000;
int processors_ = 6;
std::vector<std::shared_ptr<Grid>> grids_;
std::function<void()> when_stuck_;
std::chrono::steady_clock::time_point turns_since_;

bool has_room(const Grid& grid) {
  const bool inside_cluster = grid.started % grid.launch.cluster != 0;  // whose blocks begin together
  return inside_cluster || grid.resident.size() < grid.most;
}

/// Takes away what has ended, and lets in what there is room for.
void tidy() {
  for (auto& grid : grids_) {
    if (grid->failed) {
      for (auto& block : grid->resident) put_away(*block);
      grid->resident.clear();
      grid->done = true;
    }
    for (size_t i = 0; i < grid->resident.size();)
      if (grid->resident[i]->live == 0) {
        put_away(*grid->resident[i]);
        std::swap(grid->resident[i], grid->resident.back());
        grid->resident.pop_back();
        grid->ended++;
      } else {
        i++;
      }
    while (!grid->failed && grid->started < grid->order.size() && has_room(*grid))
      begin(*grid, grid->order[grid->started++]);
  }
  for (auto& grid : grids_) {
    if (grid->ended == grid->order.size() && (!grid->before || grid->before->done)) grid->done = true;
    if (grid->before && grid->before->done) {
      for (Fiber* fiber : grid->waiting)
        if (!grid->failed) wake(fiber);
      grid->waiting.clear();
    }
    if (grid->done) {
      fence_system();
      grid->before.reset();
      changed();
    }
  }
  std::erase_if(grids_, [](const auto& grid) { return grid->done; });
}

void fail_all(const std::string& text) {
  std::string all = text + "\n";
  for (auto& grid : grids_) {
    grid->failed = true;
    all += name_of(*grid) + waits_of(*grid);
  }
  report(all);
}

/// A copy at fault that lands between threads ends its block's grid.
template <class Act>
bool guarded(Block& block, Act act) {
  try {
    return act();
  } catch (const Landed& landed) {
    fail(*block.grid, "  a copy that landed: " + landed.what + "\n");
    return true;
  }
}

/// True if a copy of one of the blocks did.
bool land_any_copy(const std::vector<Block*>& blocks) {
  if (blocks.empty()) return false;
  const size_t first = draw(blocks.size());
  for (size_t i = 0; i < blocks.size(); i++) {
    Block& block = *blocks[(first + i) % blocks.size()];
    if (block.bulk.empty() && block.copying.empty()) continue;
    enter(&block);
    if (guarded(block, [&] { return land_one(block); })) return true;
  }
  return false;
}

/// Time passes for threads that are `awake`, but only poll, and for those that sleep at an mbarrier.
void leap(const std::vector<Block*>& blocks, bool awake) {
  bool patient = awake;
  for (const Block* block : blocks) patient |= !block->sleepers.empty();
  if (!patient || stillness.leaps > kMostLeaps) {
    fail_all(patient ? "threads go round and round, and nothing changes" : "deadlock: all threads wait");
    stillness.leaps = 0;
    return;
  }
  stillness.leaps++;
  clock_ += kLeapNs;
  if (stillness.leaps > 2 && when_stuck_ && !stillness.told) {
    stillness.told = true;
    const auto action = std::exchange(when_stuck_, nullptr);
    action();
  }
  for (Block* block : blocks) {
    for (const Sleeper& sleeper : block->sleepers) wake(sleeper.fiber);
    block->sleepers.clear();
  }
}

}  // namespace

Grid::Grid() = default;
Grid::~Grid() = default;
bool Grid::lets_next_start() const {
  if (done) return true;
  return started == order.size() && std::all_of(resident.begin(), resident.end(), [](const auto& block) {
           return block->lets_next_start || block->live == 0;
         });
}

void start(std::shared_ptr<Grid> grid) {
  catch_signals();
  const Launch& launch = grid->launch;
  const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z,
               clusters = blocks / launch.cluster;
  std::vector<unsigned> order(clusters);
  for (size_t i = 0; i < clusters; i++) order[i] = static_cast<unsigned>(i);
  for (size_t i = clusters; i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
  for (const unsigned cluster : order)
    for (unsigned i = 0; i < launch.cluster; i++) grid->order.push_back(cluster * launch.cluster + i);
  grid->clusters.resize(clusters);
  // A kernel has at least a block on every processor at once, as long as it has that many.
  grid->most =
      launch.together ? blocks : static_cast<size_t>(processors_) + draw(static_cast<uint64_t>(processors_));
  grids_.push_back(std::move(grid));
  changed();
}

bool turn() {
  tidy();
  if (grids_.empty()) {
    enter(nullptr);
    return false;
  }
  clock_ += 100;
  std::vector<Block*> runnable, all;
  int threads = 0;
  for (auto& grid : grids_)
    for (auto& block : grid->resident) {
      all.push_back(block.get());
      threads += block->live;
      if (block->ready) runnable.push_back(block.get());
    }
  const bool still = stillness.pauses > 1000 + 4 * static_cast<uint64_t>(threads);
  if (!runnable.empty() && !still) {
    Block& block = *runnable[draw(runnable.size())];
    guarded(block, [&] { return run(block), true; });
    maybe_land_late_stores();
    if (draw(1024) == 0 &&
        std::chrono::duration<double>(std::chrono::steady_clock::now() - turns_since_).count() > kMostSeconds)
      fail_all(format("the device has not come to an end in %.0f s", kMostSeconds));
    return true;
  }
  // Nobody gets on by itself: what is on its way lands, or time passes.
  stillness.pauses = 0;
  if (!land_any_copy(all) && !land_late_store()) leap(all, !runnable.empty());
  return true;
}

void stop_all() {
  for (auto& grid : grids_) grid->failed = true;
  forget_late_stores();
  tidy();
  enter(nullptr);
}

void begin_waiting() { turns_since_ = std::chrono::steady_clock::now(); }

void grid_wait() {
  Grid& grid = *self->block->grid;
  while (grid.before && !grid.before->done) {
    grid.waiting.push_back(self);
    self->where = __builtin_return_address(0);
    wait_in("the kernel before");
  }
}
void grid_launch_dependents() {
  if (self->block->lets_next_start) return;
  self->block->lets_next_start = true;
  changed();
}

uint64_t clock_ns() { return clock_ += 1; }

int processor_count() { return processors_; }
void processors(int count) { processors_ = count; }
void when_stuck(std::function<void()> action) { when_stuck_ = std::move(action); }

}  // namespace simt
