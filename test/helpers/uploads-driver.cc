// Reads tensors from a file to a device that is none, with several threads, for ThreadSanitizer:
// native/engine/weights.cc and uploads.cc as a GPU uses them. The device copies on a thread of its own, as an
// engine of a GPU does.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <queue>
#include <thread>

#include "engine/weights.h"

namespace {

/// Two rooms in turn: one is filled while the other is copied away.
class LateCopy final : public tp::Upload {
 public:
  explicit LateCopy(size_t bytes)
      : rooms_{std::vector<char>(bytes), std::vector<char>(bytes)}, thread_([this] { loop(); }) {}
  ~LateCopy() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void* room() override {
    std::unique_lock<std::mutex> lock(mutex_);
    turn_ ^= 1;
    changed_.wait(lock, [this] { return !busy_[turn_]; });
    return rooms_[turn_].data();
  }
  void send(void* device, size_t bytes) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      busy_[turn_] = true;
      queue_.push({turn_, device, bytes});
    }
    changed_.notify_all();
  }
  void finish() override {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !busy_[0] && !busy_[1]; });
  }

 private:
  struct Copy {
    int room;
    void* to;
    size_t bytes;
  };
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const Copy copy = queue_.front();
      queue_.pop();
      lock.unlock();
      std::memcpy(copy.to, rooms_[copy.room].data(), copy.bytes);
      lock.lock();
      busy_[copy.room] = false;
      changed_.notify_all();
    }
  }

  std::vector<char> rooms_[2];
  int turn_ = 0;
  bool busy_[2] = {false, false}, stop_ = false;
  std::queue<Copy> queue_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::thread thread_;
};

class FarBackend final : public tp::Backend {
 public:
  const tp::Ops& ops() const override { std::abort(); }  // reading needs none
  void* allocate(size_t bytes) override {
    blocks_.push_back(std::vector<char>(bytes + 64));
    const auto at = reinterpret_cast<uintptr_t>(blocks_.back().data());
    return reinterpret_cast<void*>((at + 63) / 64 * 64);
  }
  void parallel(int count, void (*work)(void*, int, int), void* context) override {
    for (int i = 0; i < count; i++) work(context, i, 0);
  }
  int threads() const override { return 1; }
  void* scratch(int, size_t) override { std::abort(); }
  bool on_host() const override { return false; }
  std::unique_ptr<tp::Upload> make_upload(size_t bytes) override { return std::make_unique<LateCopy>(bytes); }

 private:
  std::vector<std::vector<char>> blocks_;
};

/// Rows [first, first + rows) and columns [left, left + columns) of a (rows_in_file, columns_in_file) tensor.
struct Case {
  int64_t rows_in_file, columns_in_file, first, rows, left, columns;
};

/// What stands at element i of every file.
tp::Bf16 expected(int64_t i) {
  const auto bits = static_cast<uint16_t>(i * 40503 >> 7);
  tp::Bf16 value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

int check(const Case& c, int fd, int threads) {
  FarBackend backend;
  tp::Weights weights({{"t", {c.rows, c.columns}}}, backend, threads);
  weights.read(
      "t", {{c.rows_in_file, c.columns_in_file}, {c.first, c.left}, {c.first + c.rows, c.left + c.columns}},
      fd, 0);
  weights.complete();
  const tp::Bf16* read = weights.get("t", {c.rows, c.columns});
  int wrong = 0;
  for (int64_t r = 0; r < c.rows; r++)
    for (int64_t k = 0; k < c.columns; k++) {
      const tp::Bf16 want = expected((c.first + r) * c.columns_in_file + c.left + k);
      wrong += std::memcmp(&read[r * c.columns + k], &want, sizeof want) != 0;
    }
  return wrong;
}

}  // namespace

int main() {
  char name[] = "/tmp/tp-run-uploads-XXXXXX";
  const int fd = mkstemp(name);
  unlink(name);
  constexpr int64_t kElements = int64_t{24} << 20;
  std::vector<tp::Bf16> content(static_cast<size_t>(kElements));
  for (int64_t i = 0; i < kElements; i++) content[static_cast<size_t>(i)] = expected(i);
  for (size_t done = 0; done < content.size() * 2;) {
    const ssize_t n = write(fd, reinterpret_cast<char*>(content.data()) + done, content.size() * 2 - done);
    if (n <= 0) return 2;
    done += static_cast<size_t>(n);
  }
  const Case cases[] = {{6144, 4096, 0, 6144, 0, 4096},
                        {6144, 4096, 1536, 3072, 0, 4096},
                        {6144, 4096, 0, 6144, 1024, 2048},
                        {24576, 1024, 0, 24576, 512, 8}};
  int wrong = 0, read = 0;
  // two engines read at the same time, each with threads of its own
  for (const Case& c : cases) {
    int other = 0;
    std::thread beside([&] { other = check(c, fd, 3); });
    wrong += check(c, fd, 4);
    beside.join();
    wrong += other;
    read += 2;
  }
  std::printf("uploads: %d tensors read by 3 and 4 threads, %d wrong elements\n", read, wrong);
  return wrong ? 1 : 0;
}
