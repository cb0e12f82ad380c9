// What an engine refuses, with the values that were wrong: TP_PLAN for a spec, TP_BATCH for a step's input.
#pragma once

#include "engine/spec.h"
#include "ops/ops.h"

namespace tp {

void check_spec(const EngineSpec& spec);
void check_batch(const Batch& batch, const EngineSpec& spec);
/// A burst feeds row r's token to token r: every token has a row, in order, and the positions last for
/// `steps`.
void check_burst(const Batch& batch, const EngineSpec& spec, int steps);

}  // namespace tp
