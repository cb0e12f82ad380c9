// A small emulator of CUDA's execution model on the host: every CUDA thread is a fiber, one runs at a time,
// and what runs next is drawn from a seed, so a run that fails fails again. docs/simt.md says what is
// modelled.
//
// Kernels see include/cuda_runtime.h and include/base/ptx.cuh, which end here; tests see the few functions at
// the end of this file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace simt {

struct Uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct Block;
struct Warp;

/// One CUDA thread.
struct Fiber {
  Uint3 thread;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  const char* waits = "";        // for what, while it does
  const void* where = nullptr;   // the caller of what it waits in
  const void* polled = nullptr;  // first address of the loop of loads that it may be in
  int group = 0;                 // of cp.async copies, the open one
};

/// The running thread.
extern Fiber* self;

/// Its block, and the sizes of that and of the grid.
extern Uint3 block_index, block_dim, grid_dim;

// ---- what kernels call. `Op`s of a warp need exactly the lanes of their mask.

enum class Op : uint8_t {
  syncwarp,
  shfl,
  shfl_up,
  shfl_down,
  shfl_xor,
  ballot,
  all,
  any,
  add,
  min,
  max,
  match,
  mma16,
  mma8,
  ldmatrix,
  ldmatrix_trans,
};

/// A collective of a warp's lanes: what the lane gives, and what it gets.
uint64_t collective(Op op, uint32_t mask, uint64_t value, int argument = 0);

struct MmaOperands {
  float* acc;
  uint32_t a[4], b[2];
};

/// threads 0: all of the block that have not ended.
void barrier_wait(int id, int threads);
void barrier_arrive(int id, int threads);
void cluster_wait();
int cluster_rank();
/// What lies in the static shared memory of the cluster's block of that rank where `here` lies in this one's.
void* static_of(unsigned rank, void* here);

char* dynamic_shared(int align);
uint32_t shared_address(const void* p);
/// `bytes` of the block's shared memory; an error where there are none.
char* shared_memory(uint32_t address, int bytes);

void mbarrier_init(uint32_t barrier, int arrivals);
void mbarrier_arrive(uint32_t barrier, int bytes);
bool mbarrier_try_wait(uint32_t barrier, uint32_t parity);
bool mbarrier_test_wait(uint32_t barrier, uint32_t parity);

void copy_async(uint32_t to, const void* from, int bytes, int room);
void copy_async_commit();
void copy_async_wait(int pending);
void copy_async_wait_all();
void copy_async_arrive(uint32_t barrier);
void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier);
void copy_box(uint32_t to, const void* map, int x, int y, int z, uint32_t barrier);

/// A store that lands some time later, in no order with others.
void store_late(void* to, const void* value, int bytes);
/// Before a load that other blocks or ranks may be changing: going round a loop of such loads gives others a
/// turn.
void load_shared_with_others(const void* from);
/// Something happened that others may be waiting for.
void changed();
void fence_system();
/// Gives others a turn.
void pause();
/// Sometimes gives others a turn.
void maybe_pause();

void grid_wait();
void grid_launch_dependents();

uint64_t clock_ns();

/// Reports what the running thread did wrong, and ends its kernel as a fault of the device.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- what the runtime functions need

struct Launch {
  const void* kernel = nullptr;  // for its name
  std::function<void()> body;    // by every thread
  Uint3 grid, block;
  size_t shared = 0;
  unsigned cluster = 1;
  bool overlaps = false, together = false;
};

// ---- what tests call

/// What is drawn from it: order of threads, warps and blocks, when copies land, when kernels start.
void seed(uint64_t value);
/// Multiprocessors of a device made after this.
void processors(int count);
/// Called once when nobody gets on, before time runs out for those who wait: what the host would do then.
void when_stuck(std::function<void()> action);
/// Reports of faults so far, and the last one.
int faults();
const std::string& last_fault();
/// Forgets the faults of all devices, and what was left to run there.
void reset();
/// Keeps reports to itself: for tests of faults.
void quiet(bool on);
/// Thread switches so far.
uint64_t switches();

}  // namespace simt
