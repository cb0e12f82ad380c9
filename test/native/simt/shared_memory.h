// Shared memory: static, where the compiler put it, and dynamic, one piece a block.
#pragma once

#include <cstdint>

#include "block.h"

namespace simt {

constexpr unsigned char kPoison = 0xff;  // NaN in fp32 and bfloat16, -1 in integers

void take_shared(Block& block);
void give_back_shared(Block& block);
/// A fault if the block wrote behind its dynamic shared memory.
void look_behind_shared(const Block& block);

/// Puts a block's static shared memory in place of whatever is there; null: the host's own.
void enter(Block* block);
/// `bytes` at a 32-bit address of the block whose shared memory is in place; a fault where there are none.
char* room_at(uint32_t address, int bytes);

}  // namespace simt
