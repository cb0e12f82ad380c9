#include "engine/stage_timer.h"

#include <algorithm>
#include <chrono>
#include <limits>

namespace tp {

namespace {

constexpr int kMarks = 4;  // begin, inputs there, later inputs there, end
constexpr int kTries = 64;

int64_t host_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

StageTimer::StageTimer(const Program& program, Backend& backend, Fused* fused)
    : program_(program), backend_(backend), fused_(fused) {
  const size_t calls = program.calls().size();
  begins_ = static_cast<uint64_t*>(backend.allocate_shared(calls * sizeof(uint64_t)));
  ends_ = static_cast<uint64_t*>(backend.allocate_shared(calls * sizeof(uint64_t)));
  tie_clocks();
  if (!fused) return;
  for (const Program::Call& call : program.calls())
    stages_ = std::max(stages_, static_cast<size_t>(call.stage_number + 1));
  blocks_ = static_cast<size_t>(fused->blocks());
  marks_ = static_cast<uint64_t*>(backend.allocate(bytes_of({blocks_, stages_, kMarks, sizeof(uint64_t)})));
  fused->measure(marks_);
}

StageTimer::~StageTimer() {
  if (fused_) fused_->measure(nullptr);
}

void StageTimer::tie_clocks() {
  if (backend_.on_host()) return;  // one clock
  // The device notes its time between two looks at the host's clock: the closest pair tells most.
  int64_t closest = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < kTries; i++) {
    const int64_t before = host_ns();
    backend_.ops().note_time(ends_, backend_);
    backend_.finish();
    const int64_t apart = host_ns() - before;
    if (apart >= closest) continue;
    closest = apart;
    offset_ = before + apart / 2 - static_cast<int64_t>(*ends_);
  }
}

void StageTimer::enter(size_t index) {
  if (index == 0) stretches_.clear();
  last_ = begins_ + index;
  backend_.ops().note_time(begins_ + index, backend_);
}

void StageTimer::leave(size_t from, size_t to, bool fused) {
  uint64_t* const end = ends_ + to - 1;
  backend_.ops().note_time(end, backend_);
  stretches_.push_back({from, to, last_, fused});
  last_ = end;
}

StageTimer::Times StageTimer::times() const {
  const size_t calls = program_.calls().size();
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  Times times;
  times.spans.assign(calls * 3, kNone);
  std::vector<uint64_t> marks;  // (blocks, stages, 4)
  if (std::any_of(stretches_.begin(), stretches_.end(), [](const Stretch& s) { return s.fused; })) {
    marks.resize(blocks_ * stages_ * kMarks);
    backend_.read(marks.data(), marks_, marks.size() * sizeof(uint64_t));
    for (size_t b = 0; b < kSampledBlocks; b++)
      times.blocks.push_back(static_cast<int>(b * (blocks_ - 1) / (kSampledBlocks - 1)));
    times.marks.assign(kSampledBlocks * calls * 3, kNone);
  }
  for (const Stretch& stretch : stretches_) {
    if (stretch.fused) {
      split(stretch, marks, times);
      continue;
    }
    double* const span = &times.spans[stretch.from * 3];
    span[0] = span[1] = on_host(*stretch.began);
    span[2] = on_host(ends_[stretch.from]);
  }
  return times;
}

/// A stage lasts from the last block's end of the stage before to the last block's end of it; its inputs are
/// there when the last block has them. Blocks that had nothing to wait for leave an old mark, from before
/// they began.
void StageTimer::split(const Stretch& stretch, const std::vector<uint64_t>& marks, Times& times) const {
  const auto& calls = program_.calls();
  uint64_t begin = *stretch.began;
  for (size_t i = stretch.from; i < stretch.to; i++) {
    if (calls[i].stage_number < 0) continue;
    const auto mark = [&](size_t block, int which) {
      const size_t stage = block * stages_ + static_cast<size_t>(calls[i].stage_number);
      const uint64_t* const of_stage = &marks[stage * kMarks];
      return std::max(of_stage[which], of_stage[0]);
    };
    uint64_t inputs = begin, end = begin;
    for (size_t b = 0; b < blocks_; b++) {
      inputs = std::max(inputs, mark(b, 1));
      end = std::max(end, mark(b, 3));
    }
    if (i + 1 == stretch.to) end = std::max(end, ends_[i]);  // and the launch itself is over
    double* const span = &times.spans[i * 3];
    span[0] = on_host(begin);
    span[1] = on_host(std::min(inputs, end));
    span[2] = on_host(end);
    for (size_t s = 0; s < times.blocks.size(); s++) {
      const auto block = static_cast<size_t>(times.blocks[s]);
      double* const own = &times.marks[(s * calls.size() + i) * 3];
      own[0] = on_host(mark(block, 0));
      own[1] = on_host(mark(block, 1));
      own[2] = on_host(mark(block, 3));
    }
    begin = end;
  }
}

}  // namespace tp
