// One rank's engine: owns weights, cache and buffers, and runs the program step by step. Knows no Node and no
// sockets.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/collective.h"
#include "engine/collective_bench.h"
#include "engine/inspect.h"
#include "engine/program.h"
#include "engine/stage_timer.h"

namespace tp {

class Engine {
 public:
  explicit Engine(EngineSpec spec);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  Weights& weights() { return *weights_; }
  /// The device collective's part of joining the ranks; TP_PLAN when the spec names none.
  DeviceCollective& collective();
  /// Lets work under way end without its peers, from any thread: nothing useful comes of this engine any
  /// more.
  void abort();
  /// What the device collective says went wrong, from any thread; "" if nothing did or there is none.
  std::string collective_error() const;
  /// Checks that every tensor is loaded and resolves the plan.
  void prepare();
  /// Takes one step's input; TP_BATCH when it breaks a limit.
  void begin(const Batch& batch);
  /// Runs from step `from` to the end or to a sync that the host must do; returns its index, or the number of
  /// steps.
  int run(int from);

  /// What each step of a burst sampled, and when it ended, in ms on the backend's clock.
  struct Burst {
    std::vector<int> token;      // (steps, R)
    std::vector<float> logprob;  // (steps, R)
    std::vector<double> end_ms;  // (steps)
    int rows;
  };
  /// Runs `steps` whole steps, up to kHistory, each on the tokens that the one before it sampled: the host
  /// takes no part between them. The step's input is that of begin(): every token has a row, in order.
  Burst decode(int steps);

  /// From now on run() notes when every call runs, and records nothing; decode() is refused meanwhile.
  void time_stages(bool on);
  /// Of the last whole step; TP_PLAN when nobody asked for times.
  StageTimer::Times stage_times() const;
  /// (calls) weight and cache bytes that each call of the last step had to read.
  std::vector<double> call_bytes() const;
  /// Fills all positions of a sequence's cache with made-up keys and values, the same ones every time:
  /// numbers spread evenly over (-1/2, 1/2) that depend on layer, slot and place alone.
  void fill_cache(int slot);

  struct SyncBuffers {
    float* send;
    int64_t send_floats;
    float* gathered;  // null for an all-reduce
    int64_t gathered_floats;
  };
  SyncBuffers sync_buffers(int index) const;

  struct Result {
    std::vector<int> token;             // (R)
    std::vector<float> logprob;         // (R)
    std::vector<float> target_logprob;  // (R)
  };
  /// TP_NATIVE when the logits were not numbers.
  Result result() const;
  /// Copies (R, localVocab) of the last step.
  void logits(float* out) const;
  int64_t logits_floats() const { return int64_t{input_.rows} * dims_.local_vocab; }

  Inspector& inspector() { return *inspector_; }
  const std::vector<TraceEntry>& trace() const { return trace_; }
  void plant_fault(std::optional<Fault> fault) { fault_ = std::move(fault); }
  Stats take_stats();
  /// GB/s of streaming through this rank's weights for about `seconds`.
  double read_bandwidth(double seconds);
  /// The device collective alone; TP_PLAN when the spec names none.
  CollectiveBench::Times time_all_reduce(int64_t floats, int samples, int warmup, bool recorded);

 private:
  void upload();
  void start(const Program::Call& call);
  void start_step(size_t from, size_t to, bool feed);
  /// As a recorded step where nobody looks between its calls.
  void start_or_replay(size_t from, size_t to, bool feed);
  /// Starts stages from step `from` on in one launch, if they can be fused; returns the step after them.
  size_t start_fused(size_t from, size_t to);
  void inspect(const Program::Call& call);
  void count_reads();
  /// What the last step had to read of the sequences' keys and values.
  double cache_bytes_of(const Program::Call& call) const;
  void require_joined() const;
  void require_numbers(int token, float logprob, size_t row) const;

  EngineSpec spec_;
  Dims dims_{};
  Batch batch_;
  Input input_{};
  std::vector<TraceEntry> trace_;
  std::optional<Fault> fault_;
  Stats stats_{};
  uint64_t experts_counted_ = 0;
  // Members die in reverse order: recorded steps hold the collective's memory, the program points into
  // buffers and weights, and those live in the backend's memory.
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<Buffers> buffers_;
  std::unique_ptr<DeviceCollective> collective_;
  std::unique_ptr<CollectiveBench> collective_bench_;
  std::unique_ptr<Program> program_;
  std::unique_ptr<Fused> fused_;       // null where the ops run one by one
  std::unique_ptr<StageTimer> timer_;  // null unless stages are timed
  std::unique_ptr<Inspector> inspector_;
};

}  // namespace tp
