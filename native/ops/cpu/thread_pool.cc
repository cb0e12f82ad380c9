#include "ops/cpu/thread_pool.h"

#include <cstdint>

namespace tp {

namespace {

/// Looks this often before it sleeps: rounds follow each other within microseconds while a token is computed.
constexpr int kSpins = 4000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) : stretches_(static_cast<size_t>(threads)) {
  for (int t = 1; t < threads; t++) workers_.emplace_back([this, t] { loop(t); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(int count, Work work, void* context) {
  if (workers_.empty() || count <= 1) {
    for (int i = 0; i < count; i++) work(context, i, 0);
    return;
  }
  work_ = work;
  context_ = context;
  int begin = 0, left = threads();
  for (Stretch& stretch : stretches_) {
    stretch.next.store(begin, std::memory_order_relaxed);
    stretch.end = begin += (count - begin) / left--;
  }
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  take(0);
  for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; spins++) {
    pause();
    if (spins > kSpins) std::this_thread::yield();  // more threads than cores: let the last worker run
  }
}

void ThreadPool::take(int thread) {
  for (int t = 0; t < threads(); t++) {
    Stretch& stretch = stretches_[static_cast<size_t>((thread + t) % threads())];
    for (int i; (i = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;)
      work_(context_, i, thread);
  }
}

void ThreadPool::loop(int thread) {
  unsigned seen = 0;
  for (;;) {
    for (int spins = 0; round_.load(std::memory_order_acquire) == seen; spins++) {
      pause();
      if (spins > kSpins) round_.wait(seen, std::memory_order_acquire);
    }
    seen++;
    if (stop_) return;
    take(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace tp
