// What a block and its warps hold while they run. Fiber, a thread, is in simt.h; Grid in scheduler.h.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda.h"
#include "scheduler.h"

namespace simt {

/// A cp.async on its way; with `barrier`, the arrival that follows all copies before it.
struct Copy {
  int group;
  char* to;  // null: the arrival
  const char* from;
  int bytes, room;
  uint32_t barrier;
};

/// A bulk copy on its way: neighbouring bytes, or a box of a matrix.
struct Bulk {
  uint32_t to, barrier;
  const char* from;
  int bytes;
  bool box;
  CUtensorMap map;
  int at[3];
};

struct Warp {
  Block* block;
  uint32_t present = 0, ended = 0;  // lanes
  uint32_t ready = 0, offered = 0;  // that may run, that wait in a collective
  Op op[32];
  uint32_t mask[32];
  uint64_t value[32], result[32];
  int argument[32];
  Fiber fibers[32];
  std::vector<Copy> copies[32];
};

constexpr int kMostWarps = 32, kBarriers = 16;

struct Barrier {
  int threads = 0, came = 0;
  bool all = false;  // __syncthreads
  std::vector<Fiber*> waiting;
  uint32_t lanes[kMostWarps] = {};  // that came
};

/// A thread that waits for an mbarrier's phase to end.
struct Sleeper {
  Fiber* fiber;
  uint32_t barrier, parity;
};

struct Block {
  Grid* grid;
  Uint3 index;
  unsigned number, cluster;
  int live = 0;  // threads
  bool lets_next_start = false;
  std::vector<Warp> warps;
  uint32_t ready = 0;  // warps with a lane that may run
  Barrier barriers[kBarriers];
  std::vector<Bulk> bulk;
  std::vector<Fiber*> copying;  // threads that may have copies on their way
  std::vector<Sleeper> sleepers;
  std::vector<char> statics;  // shared memory, while another block runs
  char* dynamic = nullptr;
};

/// The next block of the grid that begins; none of its threads runs yet.
void begin(Grid& grid, unsigned number);
/// Lets the block's threads run until it is other blocks' turn.
void run(Block& block);
/// Gives back the stacks and the shared memory of a block that has ended, or whose kernel failed.
void put_away(Block& block);

}  // namespace simt
