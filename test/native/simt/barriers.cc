#include "barriers.h"

#include "fibers.h"

namespace simt {

namespace {

void release(Block& block, int id) {
  Barrier& barrier = block.barriers[id];
  for (size_t w = 0; w < block.warps.size(); w++) {
    const uint32_t came = barrier.lanes[w], all = block.warps[w].present & ~block.warps[w].ended;
    if (came && (came & all) != all)
      fault("barrier %d of %d threads: of warp %zu only lanes %08x came, and lanes %08x have not ended", id,
            barrier.threads, w, came, all);
    barrier.lanes[w] = 0;
  }
  for (Fiber* fiber : barrier.waiting)
    if (fiber != self) wake(fiber);
  barrier.waiting.clear();
  barrier.came = barrier.threads = 0;
  changed();
}

/// True when the running thread was the last.
bool come(int id, int threads, bool waits) {
  Block& block = *self->block;
  if (id < 0 || id >= kBarriers) fault("there is no barrier %d", id);
  Barrier& barrier = block.barriers[id];
  const bool all = threads == 0;
  if (all) threads = block.live;
  if (!all && threads % 32) fault("barrier %d of %d threads: not whole warps", id, threads);
  if (barrier.came > 0 && (barrier.all != all || (!all && barrier.threads != threads)))
    fault("barrier %d: threads that came before wait for %d, this one for %d", id, barrier.threads, threads);
  uint32_t& lanes = barrier.lanes[self->warp - block.warps.data()];
  if (lanes >> self->lane & 1) fault("barrier %d: this thread came already", id);
  barrier.threads = threads, barrier.all = all;
  barrier.came++;
  lanes |= 1u << self->lane;
  if (waits) barrier.waiting.push_back(self);
  if (barrier.came < threads) return false;
  release(block, id);
  return true;
}

void release(Grid::Cluster& cluster) {
  for (Fiber* fiber : cluster.came)
    if (fiber != self) wake(fiber);
  cluster.came.clear();
}

Grid::Cluster& cluster_of(const Block& block) { return block.grid->clusters[block.cluster]; }

bool is_complete(const Grid::Cluster& cluster) {
  return static_cast<int>(cluster.came.size()) == cluster.live;
}

}  // namespace

void thread_ended(Block& block) {
  if (Barrier& barrier = block.barriers[0]; barrier.all && barrier.came > 0 && barrier.came == block.live)
    release(block, 0);
  Grid::Cluster& cluster = cluster_of(block);
  if (!cluster.came.empty() && is_complete(cluster)) release(cluster);
}

void barrier_wait(int id, int threads) {
  static const char* const kNames[] = {"__syncthreads", "barrier 1",  "barrier 2",  "barrier 3",
                                       "barrier 4",     "barrier 5",  "barrier 6",  "barrier 7",
                                       "barrier 8",     "barrier 9",  "barrier 10", "barrier 11",
                                       "barrier 12",    "barrier 13", "barrier 14", "barrier 15"};
  self->where = __builtin_return_address(0);
  if (!come(id, threads, true)) wait_in(kNames[id]);
}
void barrier_arrive(int id, int threads) {
  self->where = __builtin_return_address(0);
  come(id, threads, false);
}

void cluster_wait() {
  self->where = __builtin_return_address(0);
  Grid::Cluster& cluster = cluster_of(*self->block);
  cluster.came.push_back(self);
  if (!is_complete(cluster)) {
    wait_in("the cluster's barrier");
    return;
  }
  release(cluster);
  changed();
}
int cluster_rank() { return static_cast<int>(self->block->number % self->block->grid->launch.cluster); }

}  // namespace simt
