#include "engine/collective_bench.h"

#include <chrono>

#include "base/check.h"

namespace tp {

namespace {

/// Each buffer is summed again and again, which multiplies it by the number of ranks: with so many buffers in
/// turn, 8 ranks and 256 sums stay far from the largest float, and powers of two keep every sum exact.
constexpr int kBuffers = 16;

/// Keys of recorded steps stay below, see engine.cc.
constexpr uint64_t kKey = uint64_t{1} << 63;

/// Small whole numbers that differ by element, rank and sample.
float own_value(int64_t i, int sample, int rank) { return static_cast<float>((i + sample) % 251 + rank); }

}  // namespace

float* CollectiveBench::buffers(int64_t floats) {
  float*& memory = buffers_[floats];
  if (!memory)
    memory = static_cast<float*>(
        backend_.allocate(bytes_of({static_cast<size_t>(floats), size_t{kBuffers}, sizeof(float)})));
  return memory;
}

CollectiveBench::Times CollectiveBench::run(int64_t floats, int samples, int warmup, bool recorded) {
  if (floats < 1) fail("TP_BATCH", "an all-reduce of %lld floats", static_cast<long long>(floats));
  float* const memory = buffers(floats);
  if (!meeting_) meeting_ = static_cast<float*>(backend_.allocate(sizeof(float)));
  const int sums = recorded ? kRecorded : kEager;
  const auto reduce_all = [&] {
    for (int k = 0; k < sums; k++)
      collective_.all_reduce(memory + (k % kBuffers) * floats, floats, backend_.stream_handle());
  };

  const auto total = static_cast<size_t>(kBuffers * floats);
  std::vector<float> values(total);
  double growth = 1;  // of a buffer after its first sum
  for (int k = kBuffers; k < sums; k += kBuffers) growth *= size_;
  const double of_ranks = size_ * (size_ - 1) / 2.0;

  // A piece is recorded at its second start.
  const int before = warmup + (recorded ? 2 : 1);
  Times times{{}, 0};
  for (int sample = -before; sample < samples; sample++) {
    for (int b = 0; b < kBuffers; b++)
      for (int64_t i = 0; i < floats; i++)
        values[static_cast<size_t>(b * floats + i)] = own_value(i, sample + before, rank_);
    backend_.write(memory, values.data(), total * sizeof(float));
    collective_.all_reduce(meeting_, 1, backend_.stream_handle());  // nobody's start waits for a slower host
    backend_.finish();

    const auto start = std::chrono::steady_clock::now();
    if (recorded)
      backend_.replay(kKey | static_cast<uint64_t>(floats), reduce_all);
    else
      reduce_all();
    backend_.finish();
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    const std::string error = collective_.error();
    if (!error.empty()) fail("TP_COLLECTIVE", "%s", error.c_str());
    if (sample >= 0) times.us.push_back(took.count() / sums);

    backend_.read(values.data(), memory, total * sizeof(float));
    for (int b = 0; b < kBuffers; b++)
      for (int64_t i = 0; i < floats; i++) {
        const double sum = size_ * static_cast<double>(own_value(i, sample + before, 0)) + of_ranks;
        times.wrong += values[static_cast<size_t>(b * floats + i)] != static_cast<float>(sum * growth);
      }
  }
  return times;
}

}  // namespace tp
