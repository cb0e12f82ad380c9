// The decoder's layers as data: what a backend may fuse into fewer launches than there are ops.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/peer_memory.h"
#include "ops/ops.h"

namespace tp {

/// The ops of one layer, in order; a sync follows attn_out and down.
struct LayerArgs {
  QkvArgs qkv;
  AttentionArgs attention;
  AttnOutArgs attn_out;
  RouteArgs route;
  GateUpArgs gate_up;
  DownArgs down;
  FfnOutArgs ffn_out;
};

struct Decoder {
  std::vector<LayerArgs> layers;
  LogitsArgs logits;
};

/// A decoder whose stages run in as few launches as asked for. Stage s of layer l is number 7 l + s, the
/// logits are the last. A stretch that holds an attn_out or a down together with what follows does the sync
/// between them itself.
class Fused {
 public:
  virtual ~Fused() = default;
  virtual bool takes(const Input& in) const = 0;
  virtual void run(int from, int to, const Input& in) = 0;
  /// That run() starts at a time.
  virtual int blocks() const = 0;
  /// From now on every block leaves the ns at which each stage began, had its inputs, had its later inputs
  /// and ended: (blocks, stages, 4). Null: no more.
  virtual void measure(uint64_t* marks) = 0;
};

}  // namespace tp
