#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const { return static_cast<unsigned>(simt::cluster_rank()); }
  void sync() const { simt::cluster_wait(); }
  /// Of static shared memory.
  template <class T>
  T* map_shared_rank(T* here, unsigned rank) const {
    return static_cast<T*>(simt::static_of(rank, here));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
