// What of the caches a token sees, cut into the attention's tasks. Chunks begin at places that follow from
// the token's position and the layer's shape alone; a task is one chunk of one KV head for one token and all
// the query heads that share it.
#pragma once

#include "ops/cuda/resident/products.cuh"

namespace TP_RESIDENT {

/// What a token sees of the caches of one kind of layer.
struct Sight {
  int first, last;          // positions
  int slot;                 // of the caches
  int chunk;                // positions of one: whole tiles, few of them or few chunks
  int first_chunk, chunks;  // that hold something to see
  int before;               // tasks of the tokens before this one
  uint32_t mates;           // tokens of the step in the same slot, this one included: a bit each
  __device__ void look(int position, const Heads& h) {
    first = h.window > 0 && position >= h.window ? position - h.window + 1 : 0, last = position;
    const int tile = tile_of(h.head_dim), seen = last - first;
    const int few = seen / (tile * (kFewChunks - 1)) + 1, most = seen / (tile * kMostChunks) + 1;
    chunk = tile * (h.window > 0 ? few : min(few, max(kLongChunk, most)));
    first_chunk = first / chunk, chunks = last / chunk - first_chunk + 1;
  }
};

/// Whether the block that ends a head's last chunk joins them all; else all blocks share that work, after a
/// meeting.
__device__ inline bool joined_at_once(int chunks) { return chunks <= kFewChunks; }

/// A task, at one of its tiles. A row of the tile is a bit.
struct AttentionTask {
  int token, kv_head, chunk;
  int begin, end;  // position of the tile's first row; behind the task's last position
  int at, edge;    // where its first row lies in the caches; the row that lies at the ring's begin again
  uint32_t seen;   // rows that the token sees
  uint32_t fresh;  // tokens whose rows of this step are among them, a bit each
};

/// The tasks of one kind of layer, window or full, and what they need of the launch: the same in all layers,
/// and looked up where time is short. In shared memory.
struct Tasks {
  char* room;  // of the activations
  float* partial;
  float2* partial_scale;
  const float *q, *kv;  // projections on their way
  Bf16* out;            // activations
  uint32_t* chunks_done;
  const PeerMemory* peers;
  int partial_chunks, tokens;
  float eps;
  int begin, end;                 // the block's; taken from the last on, which has this step's keys
  int kv_heads, group, capacity;  // group: query heads of a KV head
  bool many;                      // some token's chunks are not joined at once
  Sight of[kMostTokens];
  AttentionTask first;  // of this block

  /// By one warp.
  __device__ void prepare(const Parameters& p, const LayerKind& kind, char* acts) {
    const Input& in = p.in;
    const Heads& h = kind.heads;
    const int t = threadIdx.x % 32;
    const bool there = t < in.tokens;
    Sight sight{};
    if (there) sight.look(in.position[t], h), sight.slot = in.slot[t];
    int sum = 0;
#pragma unroll 1
    for (int u = 0; u < in.tokens; u++) {
      if (u == t) sight.before = sum;
      sum += __shfl_sync(~0u, sight.chunks, u) * h.kv_heads;
      if (__shfl_sync(~0u, sight.slot, u) == sight.slot) sight.mates |= 1u << u;
    }
    const bool any = __any_sync(~0u, there && !joined_at_once(sight.chunks));
    if (there) of[t] = sight;
    if (t == 0) {
      q = p.q, kv = p.kv;
      room = acts, partial = p.partial, partial_scale = p.partial_scale, chunks_done = p.chunks_done;
      out = p.activations.attention, peers = &p.peers, partial_chunks = p.partial_chunks, eps = p.dims.eps;
      tokens = in.tokens, many = any;
      kv_heads = h.kv_heads, group = h.heads / h.kv_heads, capacity = kind.capacity;
    }
    // Neighbours, which share queries. They begin at the last block: the last ones have less of o_proj to do.
    // A block's chunks are of one token and KV head where no block gets more by it.
    const int blocks = static_cast<int>(gridDim.x), own = blocks - 1 - static_cast<int>(blockIdx.x);
    const int pairs = in.tokens * h.kv_heads, each = max(blocks / pairs, 1);  // of tokens and heads; blocks
    const int most = __reduce_max_sync(~0u, (sight.chunks + each - 1) / each);
    const int pair = min(own / each, pairs), of_token = min(pair / h.kv_heads, in.tokens - 1);
    const int of_pair = __shfl_sync(~0u, sight.chunks, of_token),
              before = __shfl_sync(~0u, sight.before, of_token);
    const auto first_of = [&](int i) {
      if (sum <= blocks) return min(i, sum);
      if (pairs > blocks || most > (sum - 1) / blocks + 1) return i * sum / blocks;
      const int chunks = pair < pairs ? of_pair : 0;
      return before + (pair - of_token * h.kv_heads) * chunks +
             ((i - pair * each) * chunks + each - 1) / each;
    };
    if (t == 0) begin = first_of(own), end = first_of(own + 1);
    __syncwarp();
    if (begin == end) return;
    AttentionTask task = at(end - 1, tile_of(h.head_dim));
    look(task, tile_of(h.head_dim));
    if (t == 0) first = task;
  }
  /// Task i, at its first tile. Tasks of a token: chunks of KV head 0, of head 1, ... By whole warps.
  __device__ __forceinline__ AttentionTask at(int i, int tile) const {
    const int lane = threadIdx.x % 32;
    AttentionTask task;
    task.token = __popc(__ballot_sync(~0u, lane < tokens && of[lane % kMostTokens].before <= i)) - 1;
    const Sight& sight = of[task.token];
    const auto own = static_cast<uint32_t>(i - sight.before), chunks = static_cast<uint32_t>(sight.chunks);
    task.kv_head = static_cast<int>(own / chunks);
    task.chunk = static_cast<int>(own) - task.kv_head * sight.chunks;
    const int begin = (sight.first_chunk + task.chunk) * sight.chunk;
    task.begin = max(begin, sight.first & -tile), task.end = min(begin + sight.chunk, sight.last + 1);
    const auto row = static_cast<int>(static_cast<uint32_t>(task.begin) % static_cast<uint32_t>(capacity));
    task.at = (sight.slot * kv_heads + task.kv_head) * capacity + row, task.edge = capacity - row;
    return task;
  }
  /// Of the caches, where row `row` of the tile lies.
  __device__ __forceinline__ int64_t row_of(const AttentionTask& task, int row) const {
    return task.at + row - (row >= task.edge ? capacity : 0);
  }
  __device__ __forceinline__ void next_tile(AttentionTask& task, int tile) const {
    task.begin += tile, task.at += tile, task.edge -= tile;
    if (task.edge <= 0) task.at -= capacity, task.edge += capacity;
  }
  /// Looks at the tile that the task is at.
  __device__ __forceinline__ void look(AttentionTask& task, int tile) const {
    const Sight& sight = of[task.token];
    task.seen = ~0u >> (32 - min(task.end - task.begin, tile)) & ~0u << max(sight.first - task.begin, 0);
    task.fresh = 0;
#pragma unroll 1
    for (uint32_t left = sight.mates; left; left &= left - 1) {
      const int t = __ffs(static_cast<int>(left)) - 1;
      const auto row = static_cast<uint32_t>(of[t].last - task.begin);
      if (row < 32 && (task.seen >> row & 1)) task.fresh |= 1u << t;
    }
  }
};

}  // namespace TP_RESIDENT
