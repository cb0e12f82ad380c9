// The whole decode step in one launch: the same stages as the ops of ops.h, run by blocks that stay on their
// multiprocessors from the first layer to the logits.
#pragma once

#include "base/peer_memory.h"
#include "ops/cuda/block.cuh"
#include "ops/decoder.h"

namespace tp::cuda::resident {

/// Stages of a layer, in order; a step is (layer * kStages + stage), and the logits after all layers.
enum Stage { kQkv, kAttention, kAttnOut, kRoute, kGateUp, kDown, kFfnOut, kStages };

constexpr int kWarps = 8;               // that compute
constexpr int kThreads = 32 * kWarps;   // of them
constexpr int kBlock = kThreads + 128;  // and the warp that keeps the ring full, of a group of four
// Registers of a thread that computes and of one that does not: what was dealt out evenly, in groups of four
// warps.
constexpr int kRegisters = 216, kFillerRegisters = 72;
constexpr int kColumns = 8;  // tokens of a tensor-core product
constexpr int kMostTopK = 8;
constexpr int kMostExperts = 128;
constexpr int kUnitRows = 8;                 // weight rows of a tensor-core product
constexpr int kUnitColumns = kUnitRows / 2;  // of gate and up: a gate row and an up row each
constexpr int kSlotRows = 4;                 // of them in one slot of the ring
constexpr int kUnitSlots = kUnitRows / kSlotRows;
constexpr int kMostSlots = 16;
// Of the ring on their way at once: two slots, and three behind the first kShortStage portions of a matrix.
// More only queue in the memory system. What comes while blocks wait for each other comes one slot at a time:
// it would be in the way of what they wait for, flags, rows and instructions.
constexpr int kOneSlot = 0, kBytesAhead = 46 << 10, kBytesFarAhead = 70 << 10, kShortStage = 4;
// Elements of a row that a warp takes, in pieces of 8: of a row as long as the hidden size, of a leaf of the
// dense MLP, of a leaf of an expert. The products are compiled for the 26B model.
constexpr int kWholePieces = 44, kDensePieces = 33, kLeafPieces = 11;
constexpr int kAttentionChunk = 256;                      // elements of a row of o_proj that a warp takes
constexpr int kAttentionPart = kAttentionChunk * kWarps;  // and all warps
constexpr int kMostChunks = 128;                          // of a full layer's cache, for one token
constexpr int kFewChunks = 16;                            // that the block which ends last joins at once
constexpr int kLongChunk = 4;                             // tiles of a full layer's chunk, if not a few do
constexpr int kMostParts = 4;                             // of a row
constexpr int kRowPieces = 3;                             // pieces of 4 that a thread keeps of a token's row

/// Of a tile's keys, and of its values.
constexpr int kTileBytes = 16 << 10;
/// Positions of a tile.
inline __host__ __device__ constexpr int tile_of(int head_dim) { return kTileBytes / 2 / head_dim; }
/// Query heads of a KV head, at most.
inline __host__ __device__ constexpr int most_group(int head_dim) { return head_dim == 256 ? 2 : 8; }
/// Four leaves of an expert's 8 rows are a warp's 32 sums; of eight leaves a second warp takes the others.
inline __host__ __device__ int halves_of(int leaves) { return leaves > 4 ? 2 : 1; }

/// Activations between stages of one launch, rounded: the block that makes a row leaves it as every block
/// will multiply it.
struct Activations {
  Bf16* normed;      // (T, H) what qkv, or the head, multiplies
  Bf16* attention;   // (T, heads * D) as wide as the widest layer's
  Bf16* router_in;   // (T, H)
  Bf16* dense_in;    // (T, H)
  Bf16* expert_in;   // (T, H)
  Bf16* dense_act;   // (T, inter)
  Bf16* expert_act;  // (T, K, moeInter)
};

/// Arrivals only ever grow, over all launches; the last block to leave notes where they stand. `early` are
/// those of a part of a stage: owners' rows, the dense MLP.
struct Counters {
  uint32_t grid, pad0[31];
  uint32_t early, pad1[31];
  uint32_t tickets, pad2[31];  // units that were drawn in this launch
  uint32_t exited, grid_before, early_before;
  int sum_turn, tokens_before;  // of the last launch: it left the values of so many tokens in two inboxes
};

/// What all layers with a window have in common, or all without.
struct LayerKind {
  Heads heads;
  int capacity;  // of a ring
};

struct Parameters {
  const LayerArgs* layers;  // (layers) in device memory
  LogitsArgs logits;
  LayerKind kinds[2];  // with a window, without; no heads: no such layer
  Dims dims;
  Input in;
  Divider by_blocks, by_tokens, by_expert_units;  // what a multiprocessor divides by is worth its code
  PeerMemory peers;
  Counters* counters;
  Activations activations;
  float *q, *kv;          // projections of a layer, as the ops' contract has them; kNothing outside it
  float* scores;          // (T, kMostExperts) the router's logits of a layer; kNothing outside it
  uint32_t* chunks_done;  // (T, kvHeads) chunks of attention that are there; 0 between layers
  float* partial;         // (T, heads, chunks, D) of attention, as wide as the widest layer needs
  float2* partial_scale;  // (T, heads, chunks): maximum, sum of exponentials
  int partial_chunks;
  uint64_t*
      marks;  // (blocks, stages, 4) ns: begin, inputs there, later inputs there, end; null = do not measure
  int layer_count, from, to;
  int first_owner;  // the block that makes token 0's rows
  int slots;        // of the ring
  int slot_bytes;
  int act_bytes;  // room of the activations
};

/// The kernel as compiled for so many tokens.
struct Kernel {
  void (*run)(Parameters);
  int tokens;
  int other_bytes;  // of shared memory that is asked for: but for ring and activations
  /// Shared memory that the stages' activations take at least for `tokens` tokens. What has more room needs
  /// fewer turns.
  int (*least_act_bytes)(const Decoder& decoder, const Dims& d, int tokens, int blocks);
};
namespace up_to_8 {
Kernel kernel();
}
namespace up_to_16 {
Kernel kernel();
}

}  // namespace tp::cuda::resident
