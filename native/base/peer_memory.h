// How kernels of several ranks reach each other's memory: a value travels as 64 bits, the number of the
// operation above its own 32, so it is valid when the number is right and needs no flag, no fence and no
// barrier.
#pragma once

#include <cstdint>

#include "base/tree.h"

namespace tp {

struct PeerMemory {
  int rank, size;
  int64_t floats;               // of one message at most
  uint64_t* inbox[kMaxLeaves];  // [r]: in rank r's memory, (2, size, floats): turns, senders, values
  volatile uint32_t* abort;     // host -> device: stop waiting; null without peers
  volatile uint32_t* late;      // device -> host: 1 + the rank that did not arrive
};

}  // namespace tp
