// The CUDA backend as its ops see it: one device, one stream, working memory, and how kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <vector>

#include "base/check.h"
#include "base/launch.cuh"
#include "ops/backend.h"

namespace tp::cuda {

const Ops& ops();

/// Throws TP_CUDA with what was being done and the driver's words; TP_MEMORY when memory ran out.
void check(cudaError_t status, const char* doing);

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int device);
  ~CudaBackend() override;

  const Ops& ops() const override { return cuda::ops(); }
  void* allocate(size_t bytes) override;
  void parallel(int count, void (*work)(void*, int, int), void* context) override;
  int threads() const override { return 1; }
  /// Host memory: what travels through it reaches the device by write().
  void* scratch(int thread, size_t bytes) override;
  bool on_host() const override { return false; }
  void write(void* device, const void* host, size_t bytes) override;
  void read(void* host, const void* device, size_t bytes) override;
  std::unique_ptr<Upload> make_upload(size_t bytes) override;
  void require(const Dims& dims, const Heads& heads) const override;
  void replay(uint64_t key, const std::function<void()>& work) override;
  std::unique_ptr<Fused> fuse(const Decoder& decoder, const Dims& dims, const PeerMemory* peers) override;

  void* allocate_shared(size_t bytes) override;
  void enter() override;
  void finish() override;
  void* stream_handle() override { return stream_; }
  cudaStream_t stream() const { return stream_; }
  int processors() const { return processors_; }
  int shared_memory() const { return shared_memory_; }
  /// Device memory for one op's partial results, zeroed when new; a name's memory is kept and grows.
  void* workspace(const char* name, size_t bytes);

  /// Launches a kernel behind the previous one. It starts early, so it must call wait_for_inputs() before it
  /// touches anything that earlier kernels wrote.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int block, size_t shared,
              const Arguments&... arguments) {
    launch_cluster(kernel, grid, block, shared, 1, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void launch_cluster(void (*kernel)(Parameters...), dim3 grid, int block, size_t shared, int cluster,
                      const Arguments&... arguments) {
    start({.grid = grid,
           .block = block,
           .stream = stream_,
           .shared = shared,
           .cluster = cluster,
           .overlap = overlap},
          kernel, arguments...);
  }
  /// Launches a kernel whose blocks wait for each other: all are resident at once, or the launch fails.
  template <class... Parameters, class... Arguments>
  void launch_together(void (*kernel)(Parameters...), dim3 grid, int block, size_t shared,
                       const Arguments&... arguments) {
    start({.grid = grid, .block = block, .stream = stream_, .shared = shared, .together = true}, kernel,
          arguments...);
  }

  /// Of weights on their way to a block: more would only crowd the second-level cache.
  int ring_bytes = 96 << 10;
  bool overlap = true;  // kernels start before their predecessor ends; off for comparison

 private:
  struct Work {
    void* memory;
    size_t bytes;
  };
  template <class... Parameters, class... Arguments>
  void start(const Launch& launch, void (*kernel)(Parameters...), const Arguments&... arguments) {
    prepare(reinterpret_cast<const void*>(kernel), launch.shared);
    check(launch_kernel(launch, kernel, arguments...), "launching a kernel");
  }
  /// Lets a kernel use `shared` bytes; the same split of cache and shared memory for all, so that two can be
  /// resident.
  void prepare(const void* kernel, size_t shared);

  int device_, processors_ = 0, shared_memory_ = 0;
  cudaStream_t stream_ = nullptr;
  std::vector<void*> blocks_, shared_blocks_;
  std::map<std::string, Work> workspaces_;
  std::map<const void*, size_t> prepared_;
  std::map<uint64_t, cudaGraphExec_t> graphs_;
  std::map<uint64_t, bool> seen_;
  std::vector<std::byte> scratch_;
  void* staging_ = nullptr;  // pinned
};

inline CudaBackend& of(Backend& backend) { return static_cast<CudaBackend&>(backend); }

void angles(const AnglesArgs&, const Dims&, const Input&, Backend&);
void embed(const EmbedArgs&, const Dims&, const Input&, Backend&);
void qkv(const QkvArgs&, const Dims&, const Input&, Backend&);
void attention(const AttentionArgs&, const Dims&, const Input&, Backend&);
void attn_out(const AttnOutArgs&, const Dims&, const Input&, Backend&);
void route(const RouteArgs&, const Dims&, const Input&, Backend&);
void gate_up(const GateUpArgs&, const Dims&, const Input&, Backend&);
void down(const DownArgs&, const Dims&, const Input&, Backend&);
void ffn_out(const FfnOutArgs&, const Dims&, const Input&, Backend&);
void logits(const LogitsArgs&, const Dims&, const Input&, Backend&);
/// What every vocabulary leaf tells the sampler, from logits that are there.
void summarise_logits(const LogitsArgs&, const Dims&, const Input&, Backend&);
void sample(const SampleArgs&, const Dims&, const Input&, Backend&);
void advance(const AdvanceArgs&, const Dims&, const Input&, Backend&);
void note_time(uint64_t* ns, Backend&);

/// Tokens that one launch takes; longer steps are cut.
constexpr int kChunk = 8;

}  // namespace tp::cuda
