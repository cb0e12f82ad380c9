// One rank's engine: owns weights, cache and buffers, and runs the program step by step. Knows no Node and no
// sockets.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/program.h"

namespace tp {

class Engine {
 public:
  explicit Engine(EngineSpec spec);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  Weights& weights() { return *weights_; }
  /// Checks that every tensor is loaded and resolves the plan.
  void prepare();
  /// Takes one step's input; TP_BATCH when it breaks a limit.
  void begin(const Batch& batch);
  /// Runs from step `from` to the end or to a sync that the host must do; returns its index, or the number of
  /// steps.
  int run(int from);

  struct SyncBuffers {
    float* send;
    int64_t send_floats;
    float* gathered;  // null for an all-reduce
    int64_t gathered_floats;
  };
  SyncBuffers sync_buffers(int index) const;

  struct Result {
    const int* token;
    const float* logprob;
    const float* target_logprob;
    int rows;
  };
  /// TP_NATIVE when the logits were not numbers.
  Result result() const;
  /// (R, localVocab) of the last step.
  const float* logits() const { return buffers_->logits; }
  int64_t logits_floats() const { return int64_t{input_.rows} * dims_.local_vocab; }

  /// A buffer by name, valid rows only; TP_PLAN for an unknown name. Index buffers come as floats.
  std::vector<float> read_buffer(const std::string& name) const;
  void write_buffer(const std::string& name, const float* values, size_t count);

  const std::vector<TraceEntry>& trace() const { return trace_; }
  void plant_fault(std::optional<Fault> fault) { fault_ = std::move(fault); }
  Stats take_stats();
  /// GB/s of streaming through this rank's weights for about `seconds`.
  double read_bandwidth(double seconds);

 private:
  struct Named {
    View view;
    bool integers;
  };
  Named named(const std::string& name) const;
  void check_sampling(float temperature, int top_k, float top_p) const;
  void rotate_angles();
  void leave(const Program::Call& call);
  void count_reads(const Program::Call& call);
  void add_fault(const Program::Call& call);
  void add_trace(const Program::Call& call);

  EngineSpec spec_;
  Dims dims_{};
  Batch batch_;
  Input input_{};
  std::vector<TraceEntry> trace_;
  std::optional<Fault> fault_;
  Stats stats_{};
  // Members die in reverse order: the program points into buffers and weights, those live in the backend's
  // memory.
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<Buffers> buffers_;
  std::unique_ptr<Program> program_;
};

}  // namespace tp
