// A few threads that share out numbered tasks. The caller works too. Tasks are taken from a counter, so a
// slow core takes fewer; no result depends on who computed it.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

namespace tp {

class ThreadPool {
 public:
  using Work = void (*)(void* context, int index, int thread);

  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Runs work(context, i, thread) for i in [0, count); returns when all are done. One caller at a time.
  void run(int count, Work work, void* context);
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

 private:
  void loop(int thread);
  void take(int thread);

  std::vector<std::thread> workers_;
  Work work_ = nullptr;
  void* context_ = nullptr;
  int count_ = 0;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> busy_{0};
  alignas(64) std::atomic<unsigned> round_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace tp
