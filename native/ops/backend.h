// Where ops run: memory and threads (or a stream) of one device.
#pragma once

#include <cstddef>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "ops/decoder.h"

namespace tp {

/// The product of some sizes, or 2^62 when it is more: no machine has that, so allocate() will refuse it.
inline size_t bytes_of(std::initializer_list<size_t> sizes) {
  constexpr size_t kMost = size_t{1} << 62;
  size_t bytes = 1;
  for (size_t size : sizes)
    if (__builtin_mul_overflow(bytes, size, &bytes) || bytes > kMost) return kMost;
  return bytes;
}

/// One host thread's way of bringing data to a device while it fetches more.
class Upload {
 public:
  Upload() = default;
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;
  virtual ~Upload() = default;

  /// As many bytes as make_upload() was told, which no copy reads any more.
  virtual void* room() = 0;
  /// Starts copying what room() gave; the device has it after finish().
  virtual void send(void* device, size_t bytes) = 0;
  virtual void finish() = 0;
};

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

  /// Whether the host may touch allocate()d memory; else it goes through write() and read(), in the order of
  /// the ops.
  virtual bool on_host() const { return true; }
  /// An address may be null where `bytes` is 0.
  virtual void write(void* to, const void* host, size_t bytes) {
    if (bytes > 0) std::memcpy(to, host, bytes);
  }
  virtual void read(void* host, const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(host, from, bytes);
  }
  /// Null on the host.
  virtual std::unique_ptr<Upload> make_upload(size_t /*bytes*/) { return nullptr; }
  /// Memory that the host and the ops both reach, zeroed: what a step leaves for the host to see while it
  /// runs on.
  virtual void* allocate_shared(size_t bytes) { return allocate(bytes); }
  /// Directs the calling thread's device calls to this backend's device; ops do it themselves.
  virtual void enter() {}
  /// Waits for everything that was started.
  virtual void finish() {}
  /// The stream that ops run on, for device collectives; null on the host.
  virtual void* stream_handle() { return nullptr; }
  /// Throws TP_LIMIT with the real values if an op of this backend cannot take a model or one of its layers.
  virtual void require(const Dims&, const Heads&) const {}
  /// Runs `work`, which does nothing but call ops. Work of the same key makes the same calls, so a device may
  /// record it.
  virtual void replay(uint64_t /*key*/, const std::function<void()>& work) { work(); }

  /// The decoder's stages in fewer launches than there are ops, or null where the ops are all there is.
  /// `peers`: to the other ranks, null when they are out of reach.
  virtual std::unique_ptr<Fused> fuse(const Decoder&, const Dims&, const PeerMemory*) { return nullptr; }

  template <class Work>
  void parallel(int count, Work&& work) {
    parallel(
        count, [](void* context, int index, int thread) { (*static_cast<Work*>(context))(index, thread); },
        &work);
  }
};

/// isa: "auto", "generic", "avx2" or "avx512"; TP_ISA if this machine lacks it.
std::unique_ptr<Backend> make_cpu_backend(const char* isa, int threads);

/// `device`: index among the GPUs that this process sees. TP_DEVICE if there is none, or no driver.
std::unique_ptr<Backend> make_cuda_backend(int device);

/// What the driver shows this process, or why it shows nothing.
struct CudaDevice {
  std::string name;
  int major, minor;  // compute capability
  double free_bytes, total_bytes;
  std::vector<int> peers;  // devices whose memory this one can reach
};
struct CudaDevices {
  std::vector<CudaDevice> devices;
  std::string why;
};
CudaDevices cuda_devices();

/// Version of the CUDA that is compiled in, or null.
const char* cuda_version();

/// Comma-separated instruction sets that this machine can run, best first.
const char* cpu_isas();

}  // namespace tp
