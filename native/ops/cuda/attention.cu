// One query a head over the cache. The cache is cut at fixed positions into chunks; a block takes a chunk for
// up to 8 query heads of one KV head. A query that sees one chunk is done then; else the block that finishes
// last joins the chunks in their order. So neither the batch nor timing changes a bit.
#include <algorithm>

#include "ops/cuda/attention_plain.cuh"
#include "ops/cuda/attention_tensor.cuh"
#include "ops/cuda/grouped/grouped.h"

namespace tp::cuda {

namespace {

/// Tokens of one launch, and memory for their parts.
constexpr size_t kMostTokens = 64, kMostPartial = size_t{256} << 20;

}  // namespace

void attention(const AttentionArgs& a, const Dims& d, const Input& in, Backend& backend) {
  CudaBackend& cuda = of(backend);
  if (grouped::takes(a, d, in.tokens)) return grouped::attention(a, d, in, cuda);
  const Heads& h = a.heads;
  const int group = h.heads / h.kv_heads;
  AttentionParameters p{};
  p.args = a;
  const int visible = h.window > 0 && h.window < a.cache.capacity ? h.window : a.cache.capacity;
  p.positions = positions_of(h.head_dim);
  p.chunks = (visible + p.positions - 2) / p.positions + 1;  // the first and the last may be cut
  p.block_heads = group < kGroup ? group : kGroup;
  p.group = group;
  p.blocks_of_kv = divider((group + p.block_heads - 1) / p.block_heads);
  const int head_blocks = h.kv_heads * static_cast<int>(p.blocks_of_kv.divisor);
  p.bfloat16 = d.bfloat16;
  const size_t token_bytes =
      sizeof(float) * static_cast<size_t>(h.heads) * static_cast<size_t>(p.chunks) * (h.head_dim + size_t{2});
  const int most = std::max(kChunk, static_cast<int>(std::min(kMostTokens, kMostPartial / token_bytes)));
  p.arrived = static_cast<int*>(
      cuda.workspace("attention arrivals", sizeof(int) * static_cast<size_t>(most * head_blocks)));
  p.partial = static_cast<float*>(cuda.workspace(
      "attention", token_bytes * static_cast<size_t>(std::min(most, std::max(kChunk, in.tokens)))));
  const bool tensor = d.bfloat16 && h.head_dim % 32 == 0;
  for (int first = 0; first < in.tokens; first += most) {
    const int tokens = std::min(in.tokens - first, most);
    p.slot = in.slot + first;
    p.position = in.position + first;
    p.args.q = a.q + static_cast<int64_t>(first) * h.heads * h.head_dim;
    p.args.attention = a.attention + static_cast<int64_t>(first) * h.heads * h.head_dim;
    // A block may take several chunks: that changes nothing but how many blocks find nothing to do.
    const int room = std::max(1, 2 * cuda.processors() / (head_blocks * tokens));
    const dim3 grid(static_cast<unsigned>(tensor ? std::min(p.chunks, room) : p.chunks),
                    static_cast<unsigned>(head_blocks), static_cast<unsigned>(tokens));
    if (tensor) {
      cuda.launch(attend_tensor, grid, kAttentionThreads,
                  static_cast<size_t>(tensor_room(h.head_dim, p.chunks).bytes), p);
      continue;
    }
    // Queries and scores; then the meeting of the parts, and of the chunks.
    const size_t shared = std::max(
        {sizeof(float) * static_cast<size_t>(p.block_heads * (h.head_dim + p.positions)),
         sizeof(float2) * kAttentionThreads, sizeof(float) * static_cast<size_t>(p.block_heads * p.chunks)});
    if (d.bfloat16)
      cuda.launch(attend_plain<Bf16>, grid, kAttentionThreads, shared, p);
    else
      cuda.launch(attend_plain<float>, grid, kAttentionThreads, shared, p);
  }
}

}  // namespace tp::cuda
