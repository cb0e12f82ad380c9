// A few threads that share out numbered tasks. The caller works too. Each goes through a stretch of its own,
// whose tasks are neighbours in memory, and then helps with what others have left; no result depends on who
// computed it.
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

  /// What a thread has not begun of its stretch.
  struct alignas(64) Stretch {
    std::atomic<int> next{0};
    int end = 0;
  };

  std::vector<std::thread> workers_;
  std::vector<Stretch> stretches_;  // a thread's each
  Work work_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int> busy_{0};
  alignas(64) std::atomic<unsigned> round_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace tp
