// Copies to shared memory that a thread asks for and later waits for.
#pragma once

#include "block.h"

namespace simt {

/// Lands any copy of the block's; its shared memory must be in place. False: none is on its way.
bool land_one(Block& block);

}  // namespace simt
