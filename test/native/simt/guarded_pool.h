// Memory with a page at one end that nobody may touch, so that running over it is noticed at once.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace simt {

constexpr size_t kPage = 4096;

/// Pieces of one size, mapped when asked for and kept for the next who asks: blocks come and go by the
/// thousand.
class GuardedPool {
 public:
  enum class Guard { before, behind };
  GuardedPool(size_t bytes, Guard guard) : bytes_(bytes), guard_(guard) {}

  /// Of a guard before the memory, its first byte is the guard's.
  char* take() {
    if (free_.empty()) return map();
    char* const memory = free_.back();
    free_.pop_back();
    return memory;
  }
  void give_back(char* memory) { free_.push_back(memory); }

 private:
  char* map() {
    void* const mapped = mmap(nullptr, bytes_ + kPage, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      std::perror("simt: mmap");
      std::abort();
    }
    char* const memory = static_cast<char*>(mapped);
    if (++mapped_ <= kMostGuards)
      mprotect(guard_ == Guard::before ? memory : memory + bytes_, kPage, PROT_NONE);
    return memory;
  }

  // A guard costs two mappings, of which Linux gives a process 65,530. Pieces without one are neighbours, and
  // one mapping.
  static constexpr size_t kMostGuards = 16000;

  const size_t bytes_;
  const Guard guard_;
  size_t mapped_ = 0;
  std::vector<char*> free_;
};

}  // namespace simt
