// Looking into a running program: buffers by name, hashes of every stage's output, and faults planted on
// purpose.
#pragma once

#include <string>
#include <vector>

#include "engine/program.h"

namespace tp {

class Inspector {
 public:
  Inspector(const EngineSpec& spec, const Dims& dims, const Input& input, const Batch& batch,
            const Buffers& buffers, Backend& backend)
      : spec_(spec), dims_(dims), input_(input), batch_(batch), buffers_(buffers), backend_(backend) {}

  /// A buffer by name, valid rows only; TP_PLAN for an unknown name. Index buffers come as floats.
  std::vector<float> read(const std::string& name) const;
  void write(const std::string& name, const float* values, size_t count);

  /// Flips the last bit of the first element of the rows that `fault` means, if this call is its stage.
  void add_fault(const Program::Call& call, const Fault& fault);
  /// One hash for every row (and virtual shard) of what the call left behind.
  TraceEntry trace(const Program::Call& call) const;

 private:
  struct Named {
    View view;
    bool integers;
  };
  Named named(const std::string& name) const;
  int rows_of(const View& view) const { return view.per_row ? input_.rows : input_.tokens; }

  const EngineSpec& spec_;
  const Dims& dims_;
  const Input& input_;
  const Batch& batch_;
  const Buffers& buffers_;
  Backend& backend_;
};

}  // namespace tp
