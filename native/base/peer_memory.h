// How kernels of several ranks reach each other's memory: values travel in lines of four, each line one
// access. A line is there when its first value is anything but kNothing, so it needs no flag, no fence and no
// barrier; whoever has read lines empties them. Four operations take turns in an inbox: two that are read and
// not emptied yet, one under way, and one that a faster rank may have begun.
#pragma once

#include <cstdint>

#include "base/tree.h"

namespace tp {

/// Bits of a value that no sum has: not the NaN that arithmetic makes. Its bytes are alike, so that memory
/// can be filled with it.
constexpr uint32_t kNothing = 0xffffffff;
constexpr int kNothingByte = 0xff;
constexpr int kInboxTurns = 4;
constexpr int kInboxLine = 4;  // values

struct PeerMemory {
  int rank, size;
  int64_t floats;            // of one message at most
  float* inbox[kMaxLeaves];  // [r]: in rank r's memory, (kInboxTurns, size, floats): turns, senders, values
  volatile uint32_t* abort;  // host -> device: stop waiting; null without peers
  volatile uint32_t* late;   // device -> host: 1 + the rank that did not arrive
  size_t inbox_bytes() const {  // before any rank may write, all of it is kNothing
    return static_cast<size_t>(kInboxTurns * size * floats) * sizeof(float);
  }
};

}  // namespace tp
