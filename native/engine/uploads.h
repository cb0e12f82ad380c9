// Threads that read a file and carry what they read to a device, each through buffers of its own.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "ops/backend.h"
#include "ops/cpu/thread_pool.h"

namespace tp {

class Uploads {
 public:
  static constexpr size_t kPieceBytes = size_t{4} << 20;
  /// More threads read no faster from the page cache.
  static constexpr int kMostThreads = 16;

  Uploads(Backend& backend, int threads);

  /// For every piece in [0, count): `fill(i, room)` writes its at most kPieceBytes on one of the threads and
  /// returns where they go and how many they are. The copies may still be under way afterwards. Rethrows what
  /// a thread threw first.
  struct Sent {
    void* device;
    size_t bytes;
  };
  void run(int count, const std::function<Sent(int i, void* room)>& fill);
  /// Waits for all copies.
  void finish();

 private:
  ThreadPool pool_;
  std::vector<std::unique_ptr<Upload>> uploads_;  // by thread
};

}  // namespace tp
