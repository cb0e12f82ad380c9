// The middle of a layer, by a cluster of 8 blocks for up to 8 tokens: a block takes a token's norms, then
// tiles of the router for all tokens, then a token's choice. The router's rows are on their way while the
// inputs are computed.
#include <cooperative_groups.h>

#include "ops/cuda/grouped/grouped.h"
#include "ops/cuda/route.cuh"

namespace tp::cuda {

namespace {

constexpr int kCluster = 8;
static_assert(kCluster == kChunk);

/// Sorts `count` assignments by expert, then by token: thread i of `threads` takes every i-th. Quadratic, but
/// all at once.
__device__ void sort_by_expert(const RouteArgs& a, const int* index, int count, int experts, int thread,
                               int threads) {
  for (int e = thread; e <= experts; e += threads) {
    int before = 0;
#pragma unroll 4
    for (int i = 0; i < count; i++) before += index[i] < e;
    a.expert_start[e] = before;
  }
  for (int i = thread; i < count; i += threads) {
    const int expert = index[i];
    int before = 0;
#pragma unroll 2
    for (int j = 0; j < count; j++) before += index[j] < expert || (index[j] == expert && j < i);
    a.assignment[before] = i;
  }
}

template <int Per, bool Aligned>
__global__ void __launch_bounds__(kThreads, 1) route_tokens(const __grid_constant__ RouteParameters p) {
  namespace cg = cooperative_groups;
  TP_DYNAMIC_SHARED(char, shared, 1024);
  __shared__ float room[kWarps];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  const int first = static_cast<int>(blockIdx.x) / kCluster * kCluster,
            tokens = min(kCluster, p.tokens - first);
  const Place place(kSegments, threadIdx.x / 32, threadIdx.x % 32);
  const bool multiplies = threadIdx.x < kSegments * 32;
  // Shared memory: rings of 8 warps, columns, exchange.
  const Split& split = p.split;
  auto* const columns =
      reinterpret_cast<Bf16*>(shared + kBarrierBytes + kSegments * p.slots * split.slot_bytes());
  auto* const exchange_room = reinterpret_cast<float*>(columns + kColumns * split.plane);
  Exchange exchange(exchange_room, place, kSegments);
  const int tiles = (p.experts + kTileRows - 1) / kTileRows;
  // A ring for every warp, which asks for its own pieces, as many as there are slots.
  Ring asking(shared, place.warp, p.slots, split.slot_bytes()), taking = asking;
  if (multiplies && place.lane == 0) asking.prepare();
  __syncwarp();
  const auto ask = [&](int tile, int from) {
    if (Aligned && place.lane == 0 && tile < tiles)
#pragma unroll 1
      for (int c = from; c < least(from + p.slots, split.chunks); c++)
        asking.ask({{&p.router, tile * kTileRows}, {}}, split.from(place.segment, c), split.slot_bytes());
  };
  if (multiplies) ask(rank, 0);
  const RouteNorms<Per, Aligned> norms(p.args, p.split.total);
  wait_for_inputs();
  let_next_start();
  if (rank < tokens) token_norms(p, norms, first + rank, room);
  cluster.sync();

  const int planes = p.bfloat16 ? 1 : 3, most = kColumns / planes;
  bool asked = true;
#pragma unroll 1
  for (int tile = rank; tile < tiles; tile += kCluster)
#pragma unroll 1
    for (int from = 0; from < tokens; from += most) {
      const int count = least(most, tokens - from);
      sync_block();
      const float* const z = p.args.normed + static_cast<int64_t>(first + from) * split.total;
      if (Aligned && p.bfloat16)
        load_columns<true>(columns, split, count, 1, z);
      else
        load_columns<false>(columns, split, count, planes, z);
      sync_block();
      if (!multiplies) continue;
      const uint4* const column = column_of(columns, split, place, count * planes);
      Sums sums;
#pragma unroll 1
      for (int c = 0; c < split.chunks; c++) {
        if (c % p.slots == 0 && !asked) ask(tile, c);
        asked = false;
        const uint4* const x = column ? column + c * split.step / 8 : nullptr;
        const int left = split.size(place.segment) - c * split.step;
        if (Aligned) {
          sums.add(taking.take(), split.chunk, x, left, place);
          taking.release();
        } else {
          sums.add(taking.gather({{&p.router, tile * kTileRows}, {}}, split, split.from(place.segment, c)),
                   split.chunk, x, left, place);
        }
      }
      sums.join();
      exchange.give(place, sums.even);
#pragma unroll 1
      for (int i = place.thread; i < kTileRows * count; i += place.threads) {
        const int row = tile * kTileRows + i % kTileRows, t = i / kTileRows;
        if (row < p.experts)
          p.args.router_logits[static_cast<int64_t>(first + from + t) * p.experts + row] =
              exchange.template at<false>(i % kTileRows, t, planes);
      }
    }
  cluster.sync();
  if (rank < tokens && threadIdx.x < 32) {
    const float* const logits = p.args.router_logits + static_cast<int64_t>(first + rank) * p.experts;
    if (p.experts <= kFewExperts)
      choose(logits, p, first + rank);
    else
      choose_of_many(logits, exchange_room, p, first + rank);
  }
  if (!p.sort) return;
  if (tokens > 1)
    cluster.sync();
  else
    __syncthreads();
  if (rank > 0) return;
  const int count = tokens * p.top_k;
  auto* const index = reinterpret_cast<int*>(columns);
  for (int i = threadIdx.x; i < count; i += kThreads) index[i] = __ldcg(p.args.route_index + i);
  __syncthreads();
  sort_by_expert(p.args, index, count, p.experts, threadIdx.x, kThreads);
}

__global__ void __launch_bounds__(kThreads) sort_assignments(RouteArgs a, int count, int experts) {
  wait_for_inputs();
  let_next_start();
  sort_by_expert(a, a.route_index, count, experts, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
}

}  // namespace

void route(const RouteArgs& a, const Dims& d, const Input& in, Backend& backend) {
  CudaBackend& cuda = of(backend);
  if (grouped::takes(a, d, in.tokens)) return grouped::route(a, d, in, cuda);
  const Split split = split_whole(d.hidden);
  const bool one_cluster = in.tokens <= kCluster;
  // Room for a whole tile, if there is that much.
  const size_t fixed = kBarrierBytes + kColumns * split.plane * sizeof(Bf16) + kExchangeBytes;
  const int room = (cuda.shared_memory() - 2048 - static_cast<int>(fixed)) / (kSegments * split.slot_bytes());
  const int slots = least(least(room, kMostSlots), split.chunks);
  if (slots < 1) fail("TP_LIMIT", "hidden size: %d, too large for the router's shared memory", d.hidden);
  const int clusters = (in.tokens + kCluster - 1) / kCluster;
  const RouteParameters p{a,
                          matrix_of(a.router, d.experts, split),
                          split,
                          in.tokens,
                          d.experts,
                          d.top_k,
                          slots,
                          d.eps,
                          1.0f / __builtin_sqrtf(static_cast<float>(d.hidden)),
                          d.bfloat16,
                          one_cluster};
  with_row(d.hidden, [&]<int Per, bool Aligned>() {
    cuda.launch_cluster(route_tokens<Per, Aligned>, dim3(static_cast<unsigned>(clusters * kCluster)),
                        kThreads, fixed + static_cast<size_t>(kSegments * slots * split.slot_bytes()),
                        kCluster, p);
  });
  if (one_cluster) return;
  const int work = in.tokens * d.top_k > d.experts ? in.tokens * d.top_k : d.experts + 1;
  cuda.launch(sort_assignments, dim3(static_cast<unsigned>((work + kThreads - 1) / kThreads)), kThreads, 0, a,
              in.tokens * d.top_k, d.experts);
}

}  // namespace tp::cuda
