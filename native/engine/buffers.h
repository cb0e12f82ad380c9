// Every activation buffer of the program, with its shape, and the KV cache. Allocated once; fixed addresses.
#pragma once

#include <string>
#include <vector>

#include "engine/spec.h"
#include "ops/backend.h"

namespace tp {

/// Most steps of one burst, see Engine::decode.
constexpr int kHistory = 256;

/// T, R: most tokens and rows of a step; the sizes are those of Dims.
struct Buffers {
  Buffers(const EngineSpec& spec, const Dims& dims, Backend& backend);

  float* hidden;         // (T, H) residual stream
  float* normed;         // (T, H) scratch of qkv, route and logits
  float* q;              // (T, heads * D)
  float* kv;             // (T, 2 * kvHeads * D)
  float* attention;      // (T, heads * D)
  float* attn_sum;       // (T, H)
  float* router_logits;  // (T, E)
  float* dense_in;       // (T, H)
  float* expert_in;      // (T, H)
  float* route_weight;   // (T, K)
  int* route_index;      // (T, K)
  int* expert_start;     // (layers, E + 1)
  int* assignment;       // (T * K)
  float* dense_act;      // (T, inter)
  float* expert_act;     // (T, K, moeInter)
  float* ffn_sum;        // (T, 2, H)
  float* logits;         // (R, localVocab)
  float* candidates;     // (R, leaves, 3 + 3 C) this rank's
  float* gathered;  // (size, R, leaves, 3 + 3 C) of all ranks; the same memory as candidates when size is 1
  int* token;       // (R) sampled
  float* logprob;   // (R)
  float* target_logprob;           // (R)
  uint32_t* input;                 // one step's input, packed: see Engine::begin
  uint64_t* experts_read;          // (1) distinct (layer, expert) pairs so far
  int* history_token;              // (kHistory, R) shared with the host
  float* history_logprob;          // (kHistory, R)
  uint64_t* history_ns;            // (kHistory)
  uint64_t* fed_steps;             // (1)
  std::vector<AnglesArgs> ropes;   // per distinct RoPE: frequencies, and the step's angles (T, rotaryPairs)
  std::vector<int> rope_of_layer;  // index into ropes
  std::vector<Cache> caches;       // per layer
  double cache_bytes = 0;
};

/// A named buffer as rows of `width` floats, for syncs, traces and tests.
struct View {
  void* data;
  int width;            // floats (or ints) of one row
  bool per_row;         // R rows, else T
  bool sharded;         // each rank holds its own virtual shards
  int groups = 1;       // a row is `groups` repetitions of `leaves` shards (expert activations: K)
  bool rounded = true;  // bfloat16-valued in bfloat16 runs
};

}  // namespace tp
