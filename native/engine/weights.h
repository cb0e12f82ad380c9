// The tensors of one rank: one block of memory, filled slice by slice from a file or from the synthetic
// generator.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/random.h"
#include "engine/spec.h"
#include "engine/uploads.h"
#include "ops/backend.h"

namespace tp {

struct Tensor {
  std::vector<int64_t> shape;
  Bf16* data = nullptr;
  int64_t elements = 0;
  bool filled = false;
};

class Weights {
 public:
  /// `threads` read from files where the backend has none of its own.
  Weights(const std::vector<TensorSpec>& specs, Backend& backend, int threads);

  /// Fills `name` with a slice of the synthetic tensor.
  void synthesize(const std::string& name, const Slice& slice, const Synthetic& source);
  /// Fills `name` with a slice of the BF16 tensor that starts at byte `offset` of `fd`. TP_WEIGHTS_READ on a
  /// short read.
  void read(const std::string& name, const Slice& slice, int fd, int64_t offset);

  /// The tensor, checked against the shape that an op needs; TP_PLAN if it is missing, unfilled or of another
  /// shape.
  const Bf16* get(const std::string& name, const std::vector<int64_t>& shape) const;
  /// Waits for what is still on its way; TP_PLAN when a tensor was never loaded.
  void complete();
  double bytes() const { return static_cast<double>(bytes_); }
  const void* memory() const { return memory_; }

  /// A contiguous piece of a slice, in elements: where it lies in the file and in the tensor.
  struct Run {
    int64_t source, target, count;
  };

 private:
  void read_on_host(Bf16* into, const std::vector<Run>& runs, bool direct, int fd, int64_t offset);
  void read_to_device(Bf16* into, const std::vector<Run>& runs, bool direct, int fd, int64_t offset);
  Tensor& expect(const std::string& name, const Slice& slice);

  Backend& backend_;
  const int threads_;
  std::unique_ptr<Uploads> uploads_;  // while weights are read to a device
  std::map<std::string, Tensor> tensors_;
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

/// Calls run(source element, target element, count) for every contiguous piece of the slice, in order.
void for_each_run(const Slice& slice, const std::function<void(int64_t, int64_t, int64_t)>& run);

}  // namespace tp
