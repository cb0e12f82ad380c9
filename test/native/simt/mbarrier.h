// Mbarriers: 8 bytes of shared memory that count arrivals, and bytes that copies bring.
#pragma once

#include <cstdint>

#include "block.h"

namespace simt {

// Addresses are those of the block whose shared memory is in place; a fault where no mbarrier is.

void look_for_mbarrier(uint32_t address);
/// One arrival, which expects `bytes` more.
void arrive(Block& block, uint32_t address, int bytes);
/// `bytes` that were expected are there.
void bring(Block& block, uint32_t address, int bytes);

}  // namespace simt
