// Host data on its way to the GPU: two pinned buffers take turns, so that a thread reads into one while the
// copy engine empties the other.
#include "ops/cuda/cuda.h"

namespace tp::cuda {

namespace {

class CudaUpload final : public Upload {
 public:
  CudaUpload(CudaBackend& backend, size_t bytes) : backend_(backend) {
    backend.finish();  // fresh memory is cleared on the backend's stream: not behind our copies
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
    for (Buffer& buffer : buffers_) {
      check(cudaEventCreateWithFlags(&buffer.emptied, cudaEventDisableTiming), "making an event");
      check(cudaMallocHost(&buffer.memory, bytes), "allocating pinned memory");
    }
  }

  ~CudaUpload() override {
    cudaStreamSynchronize(stream_);
    for (Buffer& buffer : buffers_) {
      cudaFreeHost(buffer.memory);
      cudaEventDestroy(buffer.emptied);
    }
    cudaStreamDestroy(stream_);
  }

  void* room() override {
    backend_.enter();
    check(cudaEventSynchronize(buffers_[turn_].emptied), "copying weights to the GPU");
    return buffers_[turn_].memory;
  }

  void send(void* device, size_t bytes) override {
    Buffer& buffer = buffers_[turn_];
    check(cudaMemcpyAsync(device, buffer.memory, bytes, cudaMemcpyHostToDevice, stream_),
          "copying weights to the GPU");
    check(cudaEventRecord(buffer.emptied, stream_), "copying weights to the GPU");
    turn_ ^= 1;
  }

  void finish() override {
    backend_.enter();
    check(cudaStreamSynchronize(stream_), "copying weights to the GPU");
  }

 private:
  struct Buffer {
    void* memory = nullptr;
    cudaEvent_t emptied = nullptr;
  };
  CudaBackend& backend_;
  cudaStream_t stream_ = nullptr;
  Buffer buffers_[2];
  int turn_ = 0;
};

}  // namespace

std::unique_ptr<Upload> CudaBackend::make_upload(size_t bytes) {
  enter();
  return std::make_unique<CudaUpload>(*this, bytes);
}

}  // namespace tp::cuda
