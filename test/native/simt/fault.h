// What a fault tells people: the kernel, the thread, source lines, and what all others wait for.
#pragma once

#include <string>

#include "block.h"

namespace simt {

/// Thrown by fault() where no thread runs: by a copy that landed between threads.
struct Landed {
  std::string what;
};

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
/// "in kernel ...", a line.
std::string name_of(const Grid& grid);
/// What the threads of the grid wait for, those of the same kind together.
std::string waits_of(const Grid& grid);
/// Ends the grid as a fault of the device.
void fail(Grid& grid, const std::string& text);
/// Lets a signal such as a segmentation fault name the thread, too.
void catch_signals();

}  // namespace simt
