// What src/native.ts calls EngineSpec, as plain C++ values. Same names, same meaning.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace tp {

struct StepSpec {
  std::string op, stage;
  int layer;
  std::map<std::string, std::string> weights;  // role -> tensor
  std::string buffer;                          // of a sync point
};

struct LayerSpec {
  int heads, kv_heads, head_dim;
  int window;  // 0 = all positions
  bool k_eq_v;
  double rope_theta;
  int rotary_pairs;
};

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;
};

struct EngineSpec {
  std::string device, dtype, collective, isa;
  int threads, rank, size;
  int device_index;  // GPU among those that the process sees
  struct Model {
    int hidden, vocab, intermediate, moe_intermediate, experts, top_k, leaves;
    double eps, softcap, embed_scale;
  } model;
  std::vector<LayerSpec> layers;
  std::vector<TensorSpec> tensors;
  std::vector<StepSpec> steps;
  struct Limits {
    int tokens, rows, sequences, positions, candidates;
  } limits;
  bool trace, eager;
};

/// A box of a stored tensor: axes [start, stop) of shape.
struct Slice {
  std::vector<int64_t> shape, start, stop;
};

/// One step's input as begin() takes it.
struct Batch {
  std::vector<int> tokens, positions, slots;        // (T)
  std::vector<int> rows, targets, top_k, sequence;  // (R)
  std::vector<float> temperature, top_p;            // (R)
  std::vector<uint32_t> seed;                       // (R)
};

struct Fault {
  std::string stage;
  int layer, position, slot;
};

struct TraceEntry {
  std::string stage;
  int layer, parts;
  bool sharded;
  std::vector<uint64_t> hashes;  // (rows, parts)
};

struct Stats {
  double weight_bytes, cache_bytes;  // resident
  double read_bytes;                 // had to be read by the steps since the last call
  double experts_read;               // distinct (layer, expert) pairs among them
};

}  // namespace tp
