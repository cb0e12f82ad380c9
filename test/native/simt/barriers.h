// Barriers of a block and of a cluster.
#pragma once

#include "block.h"

namespace simt {

/// A thread of the block ended: lets those go on that wait for all that have not.
void thread_ended(Block& block);

}  // namespace simt
