// When every call of the program ran in one step: noted between the ops in the backend's own order, and taken
// from the marks that fused stages leave. Exists only while somebody measures.
#pragma once

#include <vector>

#include "engine/program.h"

namespace tp {

class StageTimer {
 public:
  /// Blocks of a device whose marks are kept.
  static constexpr int kSampledBlocks = 3;

  /// Times in ns on the host's monotonic clock. NaN for what does not stand by itself: a sync that a fused
  /// stage does, or that has nobody to join.
  struct Times {
    std::vector<double> spans;  // (calls, 3): begin, inputs there, end
    std::vector<int> blocks;    // (B) numbers of the sampled blocks; none where no stages were fused
    std::vector<double> marks;  // (B, calls, 3): the same of one block
  };

  /// `fused`: null where the ops run one by one.
  StageTimer(const Program& program, Backend& backend, Fused* fused);
  ~StageTimer();
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

  /// The calls from `index` on are about to start; a step begins with 0.
  void enter(size_t index);
  /// Calls [from, to) were started after all before them; `fused`: in one launch.
  void leave(size_t from, size_t to, bool fused);
  /// Of the step since enter(0), once the backend has finished it.
  Times times() const;

 private:
  struct Stretch {
    size_t from, to;
    const uint64_t* began;  // noted when the call before had ended
    bool fused;
  };
  void tie_clocks();
  double on_host(uint64_t ns) const { return static_cast<double>(static_cast<int64_t>(ns) + offset_); }
  void split(const Stretch& stretch, const std::vector<uint64_t>& marks, Times& times) const;

  const Program& program_;
  Backend& backend_;
  Fused* fused_;
  size_t blocks_ = 0, stages_ = 0;
  uint64_t* begins_;           // (calls) shared memory: of the first call behind the host's part
  uint64_t* ends_;             // (calls)
  uint64_t* marks_ = nullptr;  // (blocks, stages, 4) as Fused::measure has them
  int64_t offset_ = 0;         // of the host's clock from the backend's
  const uint64_t* last_ = nullptr;
  std::vector<Stretch> stretches_;
};

}  // namespace tp
