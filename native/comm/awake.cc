#include "comm/awake.h"

#ifdef __linux__
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#endif

namespace tp {

#ifdef __linux__

namespace {

constexpr int kPauses = 50;  // about a microsecond between two looks

int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

class Spinner {
 public:
  Spinner() {
    std::thread([this] { loop(); }).detach();
  }

  void until(int64_t ns) {
    until_.store(ns);
    if (asleep_.exchange(0) == 1) asleep_.notify_one();
  }

 private:
  void loop() {
    const sched_param none{};
    if (sched_setscheduler(0, SCHED_IDLE, &none) != 0)
      return;  // at any other priority it would be in the way
    for (;;) {
      while (now_ns() < until_.load(std::memory_order_relaxed)) {
        for (int i = 0; i < kPauses; i++) {
#if defined(__x86_64__)
          __builtin_ia32_pause();
#endif
        }
        // Without it the scheduler may find that the spinner, having had so little, is owed a whole tick, and
        // let woken threads wait for 4 ms.
        sched_yield();
      }
      asleep_.store(1);
      if (now_ns() < until_.load()) {
        asleep_.store(0);
        continue;
      }
      asleep_.wait(1);
    }
  }

  std::atomic<int64_t> until_{0};
  std::atomic<int> asleep_{0};
};

}  // namespace

void stay_awake(double ms) {
  static Spinner& spinner = *new Spinner;  // never destroyed: its thread lives as long as the process
  spinner.until(now_ns() + static_cast<int64_t>(ms * 1e6));
}

#else

void stay_awake(double) {}

#endif

}  // namespace tp
