#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const { return static_cast<unsigned>(simt::cluster_rank()); }
  void sync() const { simt::cluster_wait(); }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
