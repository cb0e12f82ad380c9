// Times the block of experts alone (gate and up, GELU * up, down, weighted sum) with uniformly random
// routing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tp {

/// A rank's part of one layer's experts.
struct MoeShape {
  int hidden, width, experts, top_k, leaves;
};

struct MoeCase {
  std::string variant;  // published, grouped, auto
  int tokens;
};

struct MoeTimes {
  std::vector<double> us;  // a block, one for every replay
  double experts;          // distinct ones that a block reads, on average
  double bytes;            // of their weights
  double distance;         // of its output from auto's: |a - b| / |b|
};

struct MoeBench {
  std::string gpu;
  double read_gb_per_s;  // of a kernel that only reads, on the same weights
  std::vector<MoeTimes> cases;
};

/// Runs on a GPU, `replays` recorded runs of several blocks each, every block with other weights or experts
/// than the one before, so that no cache holds them.
MoeBench bench_moe(int device, const MoeShape&, const std::vector<MoeCase>&, int replays, uint32_t seed);

}  // namespace tp
