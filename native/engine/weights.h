// The tensors of one rank: one block of memory, filled slice by slice from a file or from the synthetic
// generator.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/random.h"
#include "engine/spec.h"
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
  Weights(const std::vector<TensorSpec>& specs, Backend& backend);

  /// Fills `name` with a slice of the synthetic tensor.
  void synthesize(const std::string& name, const Slice& slice, const Synthetic& source);
  /// Fills `name` with a slice of the BF16 tensor that starts at byte `offset` of `fd`. TP_WEIGHTS_READ on a
  /// short read.
  void read(const std::string& name, const Slice& slice, int fd, int64_t offset);

  /// The tensor, checked against the shape that an op needs; TP_PLAN if it is missing, unfilled or of another
  /// shape.
  const Bf16* get(const std::string& name, const std::vector<int64_t>& shape) const;
  void require_filled() const;
  double bytes() const { return static_cast<double>(bytes_); }
  const void* memory() const { return memory_; }

 private:
  Tensor& expect(const std::string& name, const Slice& slice);

  Backend& backend_;
  std::map<std::string, Tensor> tensors_;
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

/// Calls run(source element, target element, count) for every contiguous piece of the slice, in order.
void for_each_run(const Slice& slice, const std::function<void(int64_t, int64_t, int64_t)>& run);

}  // namespace tp
