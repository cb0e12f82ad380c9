// Every op once: what it computes, its shapes and its rounding points. cpu/ is the readable specification,
// cuda/ its twin. Weights are bfloat16 as stored. Activations are fp32 buffers; in bfloat16 runs their values
// are rounded to bfloat16 where the reference rounds (marked r), so both dtypes share every buffer.
//
// T tokens in the step, R rows of them with logits, H hidden size; heads, widths and vocabulary are this
// rank's own. V virtual shards (leaves) in the whole model, of which this rank owns `leaves`.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/random.h"

namespace tp {

/// Sizes that every op may need; constant for the life of an engine.
struct Dims {
  int hidden;       // H
  int vocab;        // the whole vocabulary
  int local_vocab;  // this rank's rows of it
  int inter;        // this rank's columns of the dense MLP
  int moe_inter;    // this rank's columns of every expert
  int experts;      // E
  int top_k;        // K chosen experts a token
  int leaves;       // this rank's leaves
  int all_leaves;   // V
  int rank, size;   // size * leaves = V
  int candidates;   // C kept per vocabulary leaf
  float eps;        // RMSNorm epsilon
  float softcap;    // logits = softcap * tanh(logits / softcap); 0 = none
  bool bfloat16;    // rounding points active, KV cache in bfloat16
};

/// One step's input, as begin() took it.
struct Input {
  int tokens;                // T
  int rows;                  // R
  const int* token;          // (T)
  const int* position;       // (T)
  const int* slot;           // (T) KV-cache slot of the token's sequence
  const int* row;            // (R) index into the tokens
  const int* target;         // (R) token whose log-probability is wanted, -1 = none
  const float* temperature;  // (R) 0 = greedy
  const int* top_k;          // (R) 0 = all
  const float* top_p;        // (R) 1 = all
  const uint32_t* seed;      // (R)
  const int* sequence;       // (R)
};

/// KV cache of one layer: position p of a slot lives at p % capacity, so a sliding layer is a ring.
struct Cache {
  void* k;       // (slots, kvHeads, capacity, headDim) bfloat16 or fp32
  void* v;       // (slots, kvHeads, capacity, headDim)
  int capacity;  // positions; a ring holds its window and the step's own tokens
};

/// Attention geometry of one layer on this rank.
struct Heads {
  int heads;         // query heads
  int kv_heads;      // query head h reads KV head h / (heads / kv_heads)
  int head_dim;      // D
  int window;        // positions that a query sees, its own included; 0 = all
  int rotary_pairs;  // pairs (i, i + D/2), i < rotary_pairs, rotate
};

/// cosine and sine of position * frequency for the step's tokens: frequency and angle in fp32 as the
/// reference has them, the functions of that angle in double, rounded once.
struct AnglesArgs {
  const float* frequency;  // (pairs)
  float* cosine;           // (T, pairs)
  float* sine;             // (T, pairs)
  int pairs;
};

/// hidden = r(table[token] * scale)
struct EmbedArgs {
  const Bf16* table;  // (vocab, H)
  float* hidden;      // (T, H)
  float scale;
};

/// a = r norm(hidden); q, k, v = r(a W^T); q = r RoPE(r norm(q)), k = r RoPE(r norm(k)), v = r norm(v)
/// without weight; k and v enter the cache. Without a v projection, v starts from the raw k projection.
struct QkvArgs {
  const float* hidden;   // (T, H)
  const Bf16* norm;      // (H)
  const Bf16* q_weight;  // (heads * D, H)
  const Bf16* k_weight;  // (kvHeads * D, H)
  const Bf16* v_weight;  // (kvHeads * D, H), null: v is the raw k
  const Bf16* q_norm;    // (D)
  const Bf16* k_norm;    // (D)
  const float* cosine;   // (T, rotaryPairs) of this step's positions
  const float* sine;     // (T, rotaryPairs)
  float* normed;         // (T, H) scratch
  float* q;              // (T, heads * D)
  float* kv;             // (T, 2 * kvHeads * D) scratch: k, then v
  Heads heads;
  Cache cache;
};

/// attention = r(softmax(q . k) v) over the visible positions, fp32 inside, scale 1.
struct AttentionArgs {
  const float* q;    // (T, heads * D)
  float* attention;  // (T, heads * D)
  Heads heads;
  Cache cache;
};

/// sum = this rank's subtree of attention Wo^T: fp32, not rounded; one leaf is heads / leaves heads.
struct AttnOutArgs {
  const float* attention;  // (T, heads * D)
  const Bf16* weight;      // (H, heads * D)
  float* sum;              // (T, H)
  int columns;             // heads * D
};

/// m = r(hidden + r norm(r sum)), written to hidden; the two inputs of the FFN half, r norm(m) each;
/// router: z = r(r(r norm(m) * scale) * H^-1/2), fp32 logits z Wr^T, softmax over all experts, the K most
/// probable (ties: the lower id), renormalised, times perExpertScale. Also sorts the assignments by expert.
struct RouteArgs {
  const float* sum;              // (T, H) after the all-reduce
  float* hidden;                 // (T, H) in and out
  const Bf16* post_norm;         // (H)
  const Bf16* dense_norm;        // (H)
  const Bf16* expert_norm;       // (H)
  const Bf16* scale;             // (H)
  const Bf16* router;            // (E, H)
  const Bf16* per_expert_scale;  // (E)
  float* normed;                 // (T, H) scratch: z
  float* router_logits;          // (T, E)
  float* dense_in;               // (T, H)
  float* expert_in;              // (T, H)
  int* route_index;              // (T, K) most probable first
  float* route_weight;           // (T, K)
  int* expert_start;             // (E + 1) first assignment of each expert
  int* assignment;               // (T * K) token * K + slot, by expert, then by token
};

/// act = r(r gelu(r(x G^T)) * r(x U^T)), for the dense MLP and for every chosen expert.
struct GateUpArgs {
  const float* dense_in;       // (T, H)
  const float* expert_in;      // (T, H)
  const Bf16* gate;            // (inter, H)
  const Bf16* up;              // (inter, H)
  const Bf16* expert_gate_up;  // (E, 2 * moeInter, H): gate rows, then up rows
  const int* expert_start;     // (E + 1)
  const int* assignment;       // (T * K)
  float* dense_act;            // (T, inter)
  float* expert_act;           // (T, K, moeInter)
};

/// sum = this rank's subtrees, fp32, not rounded: the dense act D^T, and the routing-weighted sum of the
/// experts'. Within a leaf the experts of a token are added in the order of their ids.
struct DownArgs {
  const float* dense_act;     // (T, inter)
  const float* expert_act;    // (T, K, moeInter)
  const float* route_weight;  // (T, K)
  const Bf16* down;           // (H, inter)
  const Bf16* expert_down;    // (E, H, moeInter)
  const int* expert_start;    // (E + 1)
  const int* assignment;      // (T * K)
  float* sum;                 // (T, 2, H): dense, experts
};

/// f = r(r norm1(r dense) + r norm2(r experts)); hidden = r(r(hidden + r norm(f)) * layerScalar)
struct FfnOutArgs {
  const float* sum;          // (T, 2, H) after the all-reduce
  const Bf16* dense_norm;    // (H)
  const Bf16* expert_norm;   // (H)
  const Bf16* norm;          // (H)
  const Bf16* layer_scalar;  // (1)
  float* hidden;             // (T, H) in: m, out: the layer's output
};

/// What a vocabulary leaf tells the sampler about one row, followed by C candidates of three floats each:
/// score (what they are ranked by), logit, token id. 24 bits hold any id exactly.
struct LeafSummary {
  float max;     // of the leaf's logits
  float sum;     // sum e^(logit - max)
  float target;  // the target token's logit if it is in this leaf, else -inf
};
constexpr int kSummaryFloats = 3;
constexpr int kCandidateFloats = 3;

/// logits = softcap(r norm(hidden[row]) E^T) in fp32, and the summary of every leaf.
struct LogitsArgs {
  const float* hidden;  // (T, H)
  const Bf16* norm;     // (H)
  const Bf16* table;    // (localVocab, H): this rank's rows
  float* normed;        // (R, H) scratch
  float* logits;        // (R, localVocab)
  float* candidates;    // (R, leaves, 3 + 3 C)
};

/// The next token of every row: arg max (temperature 0), or a sample keyed by (seed, sequence, position),
/// filtered by top-k, then top-p. Ties: the lower token id. Log-probabilities are those of the unfiltered,
/// untempered logits.
struct SampleArgs {
  const float* candidates;  // (size, R, leaves, 3 + 3 C) after the all-gather
  int* token;               // (R)
  float* logprob;           // (R)
  float* target_logprob;    // (R) NaN without a target
};

/// The end of a step: counts the experts that it read; in a burst it also feeds the sampled tokens to the
/// next step, one position on, and leaves them in the history, where the host reads them behind the running
/// device.
struct AdvanceArgs {
  const int* expert_start;  // (layers, E + 1)
  int layers;
  uint64_t* experts_read;  // sum over layers of experts with a token
  const int* sampled;      // (R)
  const float* logprob;    // (R)
  bool feed;      // row r is token r: its sampled token and the next position become the input; in place
                  // of no token (the logits were not numbers) 0, the history keeps what was sampled
  int* token;     // (T) input of the next step
  int* position;  // (T)
  int depth;      // entries of the history, used round and round
  int most_rows;
  int* history_token;      // (depth, mostRows) shared memory
  float* history_logprob;  // (depth, mostRows)
  uint64_t* history_ns;    // (depth) when the step ended, on the backend's own clock
  uint64_t* steps;         // fed steps so far; written last
};

/// Elements of a stored tensor: `rows` times `count` neighbours, `stride` apart.
struct Stretch {
  uint64_t start, count, stride, rows;
};

class Backend;

/// The ops of one backend, each void op(args, dims, input, backend).
struct Ops {
  template <class Args>
  using Op = void (*)(const Args&, const Dims&, const Input&, Backend&);

  Op<AnglesArgs> angles;
  Op<EmbedArgs> embed;
  Op<QkvArgs> qkv;
  Op<AttentionArgs> attention;
  Op<AttnOutArgs> attn_out;
  Op<RouteArgs> route;
  Op<GateUpArgs> gate_up;
  Op<DownArgs> down;
  Op<FfnOutArgs> ffn_out;
  Op<LogitsArgs> logits;
  Op<SampleArgs> sample;
  Op<AdvanceArgs> advance;
  /// *ns, in shared memory, becomes the time on the backend's own clock when all that was started before has
  /// ended.
  void (*note_time)(uint64_t* ns, Backend&);
  /// out[r * count + i] = element start + r * stride + i of a synthetic tensor.
  void (*synthesize)(const Synthetic&, const Stretch&, Bf16* out, Backend&);
  /// Streams through memory with plain wide loads; returns a value that depends on every byte. For bandwidth
  /// tests.
  uint64_t (*stream)(const void* memory, uint64_t bytes, Backend&);
};

}  // namespace tp
