#include "engine/uploads.h"

#include <algorithm>
#include <atomic>
#include <exception>

namespace tp {

Uploads::Uploads(Backend& backend, int threads) : pool_(std::clamp(threads, 1, kMostThreads)) {
  for (int i = 0; i < pool_.threads(); i++) uploads_.push_back(backend.make_upload(kPieceBytes));
}

void Uploads::run(int count, const std::function<Sent(int, void*)>& fill) {
  struct Work {
    Uploads& self;
    const std::function<Sent(int, void*)>& fill;
    std::exception_ptr error;  // may not cross the pool: the first one waits here
    std::atomic<bool> failed{false};
  } work{*this, fill, nullptr};
  pool_.run(
      count,
      [](void* context, int i, int thread) {
        Work& all = *static_cast<Work*>(context);
        if (all.failed.load(std::memory_order_relaxed)) return;
        try {
          Upload& upload = *all.self.uploads_[static_cast<size_t>(thread)];
          const Sent sent = all.fill(i, upload.room());
          upload.send(sent.device, sent.bytes);
        } catch (...) {
          if (!all.failed.exchange(true)) all.error = std::current_exception();
        }
      },
      &work);
  if (work.error) std::rethrow_exception(work.error);
}

void Uploads::finish() {
  for (const auto& upload : uploads_) upload->finish();
}

}  // namespace tp
