// Grids that run, for runtime.cc, which decides when one starts.
#pragma once

#include <memory>
#include <vector>

#include "simt.h"

namespace simt {

struct Grid {
  Grid();
  ~Grid();
  Launch launch;
  std::shared_ptr<Grid> before;  // the kernel that griddepcontrol.wait waits for, null = none
  bool done = false, failed = false;
  // Blocks: in the order in which they start, a cluster's together; the first `started` have.
  std::vector<unsigned> order;
  size_t started = 0, ended = 0, most = 0;  // most: resident at once
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Fiber*> waiting;  // in griddepcontrol.wait
  struct Cluster {
    int live = 0;  // threads
    std::vector<Fiber*> came;
  };
  std::vector<Cluster> clusters;

  /// All blocks have let the next kernel start, or ended.
  bool lets_next_start() const;
};

uint64_t draw();
inline uint64_t draw(uint64_t below) { return draw() % below; }

/// Bytes of static shared memory of all kernels together, as every block has them.
size_t static_shared_bytes();
int processor_count();

void start(std::shared_ptr<Grid> grid);
/// Lets a block run for a while, or time pass. False: there is no grid.
bool turn();
/// Ends all grids.
void stop_all();
/// The host begins to wait for the device.
void begin_waiting();
/// A fault without a thread: prints and counts it.
void report(const std::string& text);

}  // namespace simt
