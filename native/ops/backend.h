// Where ops run: memory and threads (or a stream) of one device.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>

#include "ops/ops.h"

namespace tp {

/// The product of some sizes, or 2^62 when it is more: no machine has that, so allocate() will refuse it.
inline size_t bytes_of(std::initializer_list<size_t> sizes) {
  constexpr size_t kMost = size_t{1} << 62;
  size_t bytes = 1;
  for (size_t size : sizes)
    if (__builtin_mul_overflow(bytes, size, &bytes) || bytes > kMost) return kMost;
  return bytes;
}

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  virtual const Ops& ops() const = 0;
  /// Zeroed memory that lives as long as the backend. TP_MEMORY with asked and free bytes when there is none.
  virtual void* allocate(size_t bytes) = 0;
  /// Calls work(index) for every index in [0, count), in parallel where the backend has host threads.
  virtual void parallel(int count, void (*work)(void* context, int index, int thread), void* context) = 0;
  virtual int threads() const = 0;
  /// Working memory of one thread of the pool, at least `bytes`, contents undefined.
  virtual void* scratch(int thread, size_t bytes) = 0;

  template <class Work>
  void parallel(int count, Work&& work) {
    parallel(
        count, [](void* context, int index, int thread) { (*static_cast<Work*>(context))(index, thread); },
        &work);
  }
};

/// isa: "auto", "generic", "avx2" or "avx512"; TP_ISA if this machine lacks it.
std::unique_ptr<Backend> make_cpu_backend(const char* isa, int threads);

/// Comma-separated instruction sets that this machine can run, best first.
const char* cpu_isas();

}  // namespace tp
