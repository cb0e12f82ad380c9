// Host memory, a thread pool, and the best instruction set that this machine has.
#include "ops/backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "base/check.h"
#include "ops/cpu/thread_pool.h"

namespace tp {

namespace generic {
const Ops& ops();
}
#ifdef TP_HAVE_X86
namespace avx2 {
const Ops& ops();
}
namespace avx512 {
const Ops& ops();
}
#endif

namespace {

bool runs(const std::string& isa) {
#ifdef TP_HAVE_X86
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == "generic";
}

const Ops& ops_of(const std::string& isa) {
#ifdef TP_HAVE_X86
  if (isa == "avx512") return avx512::ops();
  if (isa == "avx2") return avx2::ops();
#endif
  return generic::ops();
}

/// MemAvailable in bytes, or 0 when the system does not say.
uint64_t available_memory() {
  std::FILE* file = std::fopen("/proc/meminfo", "r");
  if (!file) return 0;
  char line[128];
  unsigned long long kilobytes = 0;
  while (std::fgets(line, sizeof line, file))
    if (std::sscanf(line, "MemAvailable: %llu kB", &kilobytes) == 1) break;
  std::fclose(file);
  return kilobytes * 1024;
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(const std::string& isa, int threads) : ops_(ops_of(isa)), pool_(threads), scratch_(threads) {}
  ~CpuBackend() override {
    for (const Block& block : blocks_) munmap(block.memory, block.bytes);
  }

  const Ops& ops() const override { return ops_; }
  int threads() const override { return pool_.threads(); }

  void* allocate(size_t bytes) override {
    constexpr size_t kHuge = size_t{2} << 20;
    bytes = std::max(bytes, size_t{1});  // a buffer may be empty, as the angles of a layer without RoPE are
    const size_t rounded =
        bytes >= kHuge ? (bytes + kHuge - 1) / kHuge * kHuge : (bytes + 4095) / 4096 * 4096;
    total_ += rounded;
    // Linux would grant it and kill us later, at the first touch.
    if (free_ > 0 && total_ > free_)
      fail("TP_MEMORY",
           "asked for %.2f GB of host memory, %.2f GB are free; use more ranks or a smaller model",
           static_cast<double>(total_) / 1e9, static_cast<double>(free_) / 1e9);
    void* memory = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
      fail("TP_MEMORY", "asked for %.2f GB of host memory: %s", static_cast<double>(rounded) / 1e9,
           strerror(errno));
    if (bytes >= kHuge) madvise(memory, rounded, MADV_HUGEPAGE);  // weights are streamed: fewer page walks
    blocks_.push_back({memory, rounded});
    return memory;
  }

  void parallel(int count, void (*work)(void*, int, int), void* context) override {
    pool_.run(count, work, context);
  }

  void* scratch(int thread, size_t bytes) override {
    Scratch& own = scratch_[static_cast<size_t>(thread)];
    if (own.bytes.size() < bytes + 64) own.bytes.resize(bytes * 2 + 64);
    const auto address = reinterpret_cast<uintptr_t>(own.bytes.data());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  struct Block {
    void* memory;
    size_t bytes;
  };
  struct alignas(64) Scratch {
    std::vector<std::byte> bytes;
  };

  const Ops& ops_;
  const uint64_t free_ = available_memory();  // before the first block: untouched blocks still count as free
  uint64_t total_ = 0;
  std::vector<Block> blocks_;
  ThreadPool pool_;
  std::vector<Scratch> scratch_;  // one per thread
};

}  // namespace

const char* cpu_isas() {
  if (runs("avx512")) return "avx512,avx2,generic";
  if (runs("avx2")) return "avx2,generic";
  return "generic";
}

std::unique_ptr<Backend> make_cpu_backend(const char* isa, int threads) {
  std::string chosen = isa;
  if (chosen == "auto") chosen = runs("avx512") ? "avx512" : runs("avx2") ? "avx2" : "generic";
  if (!runs(chosen)) fail("TP_ISA", "this CPU cannot run %s code; it has %s", isa, cpu_isas());
  return std::make_unique<CpuBackend>(chosen, threads);
}

}  // namespace tp
