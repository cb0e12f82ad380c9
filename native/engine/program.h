// The plan, checked once and resolved to calls: step i of the plan is call i here.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "engine/buffers.h"
#include "engine/weights.h"

namespace tp {

class Program {
 public:
  enum class Sync { none, all_reduce, all_gather };

  struct Call {
    std::function<void()> run;  // empty for a sync point
    Sync sync = Sync::none;
    std::string stage;
    int layer = -1;
    std::vector<View> outputs;  // what this stage leaves behind that is complete: for traces and faults
    double weight_bytes = 0;    // read whatever the input is
    double expert_bytes = 0;    // read for every distinct expert
    bool reads_cache = false;   // and what the step's sequences hold of its layer
    int64_t floats_per_token = 0, floats_per_row = 0;  // of a sync's message
    int stage_number = -1;  // in decoder(); -1 for what is not a stage of a layer, nor the logits
  };

  /// Throws TP_PLAN for a step that is unknown, misses a weight or has one of the wrong shape.
  Program(const EngineSpec& spec, const Dims& dims, const Input& input, const Weights& weights,
          Buffers& buffers, Backend& backend);

  const std::vector<Call>& calls() const { return calls_; }
  /// The same layers as data; empty when the steps are not those of a decoder, layer by layer.
  const Decoder& decoder() const { return decoder_; }

 private:
  void number_stages();

  std::vector<Call> calls_;
  Decoder decoder_;
};

}  // namespace tp
