// The device all-reduce alone, timed and checked: launched one by one, and many in one recorded piece.
#pragma once

#include <map>
#include <vector>

#include "comm/collective.h"
#include "ops/backend.h"

namespace tp {

class CollectiveBench {
 public:
  /// All-reduces of one sample; their mean is the sample's time, so what starts and ends a sample vanishes.
  static constexpr int kEager = 32, kRecorded = 256;

  CollectiveBench(Backend& backend, DeviceCollective& collective, int rank, int size)
      : backend_(backend), collective_(collective), rank_(rank), size_(size) {}

  struct Times {
    std::vector<double> us;  // (samples) microseconds of one all-reduce
    double wrong;            // elements that differ from the exact sum, over all samples and buffers
  };
  /// All ranks call it together. TP_COLLECTIVE when `floats` exceed the collective's room or a rank is late.
  Times run(int64_t floats, int samples, int warmup, bool recorded);

 private:
  float* buffers(int64_t floats);

  Backend& backend_;
  DeviceCollective& collective_;
  const int rank_, size_;
  float* meeting_ = nullptr;           // (1) zero, for the sum before which nobody's clock starts
  std::map<int64_t, float*> buffers_;  // (kBuffers, floats) by floats: recorded pieces hold the address
};

}  // namespace tp
