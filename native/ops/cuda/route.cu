// The middle of a layer, by a cluster of 8 blocks for up to 8 tokens: a block takes a token's norms, then
// tiles of the router for all tokens, then a token's choice. The router's rows are on their way while the
// inputs are computed.
#include <cooperative_groups.h>

#include "ops/cuda/gemv.cuh"

namespace tp::cuda {

namespace {

constexpr int kCluster = 8, kFewExperts = 128;
static_assert(kCluster == kChunk);

struct RouteParameters {
  RouteArgs args;
  Matrix router;
  Split split;
  int tokens, experts, top_k, slots;
  float eps, root;  // root: H^-1/2
  bool bfloat16, sort;
};

/// The norms' weights of a block's rows, asked for before the inputs are there.
template <int Per, bool Aligned>
struct RouteNorms {
  Row<Per, Aligned> post, dense, expert, scale;
  __device__ RouteNorms(const RouteArgs& a, int n) {
    post.load(a.post_norm, n), dense.load(a.dense_norm, n), expert.load(a.expert_norm, n),
        scale.load(a.scale, n);
  }
};

/// The residual after attention, the inputs of dense MLP and experts, and z, of one token, by one block.
template <int Per, bool Aligned>
__device__ void token_norms(const RouteParameters& p, const RouteNorms<Per, Aligned>& norms, int t,
                            float* room) {
  const RouteArgs& a = p.args;
  const int n = p.split.total;
  const int64_t at = static_cast<int64_t>(t) * n;
  const auto r = [&](float x) { return round_to(p.bfloat16, x); };
  Row<Per, Aligned> m, out;
  m.load(a.sum + at, n), out.load(a.hidden + at, n);
  m.change(r);
  float squares[1] = {m.squares()};
  block_sums(squares, room);
  const float of_branch = inverse_rms(squares[0], n, p.eps);
  m.change([&](float x, float hidden, float w) { return r(hidden + r(x * of_branch * w)); }, out, norms.post);
  squares[0] = m.squares();
  block_sums(squares, room);
  const float inverse = inverse_rms(squares[0], n, p.eps);
  const auto z = [&](float, float x, float w) { return r(r(r(x * inverse) * w) * p.root); };
  const auto normed = [&](float, float x, float w) { return r(x * inverse * w); };
  out.change(z, m, norms.scale);
  out.store(a.normed + at, n);
  m.store(a.hidden + at, n);
  out.change(normed, m, norms.dense);
  out.store(a.dense_in + at, n);
  out.change(normed, m, norms.expert);
  out.store(a.expert_in + at, n);
}

/// The K most probable experts of one token and their weights, by one warp; a lane has every 32nd expert.
/// At most 128 experts. Equal probabilities: the lower id.
__device__ void choose(const float* logits, const RouteParameters& p, int t) {
  constexpr int kPer = kFewExperts / 32;
  const int lane = threadIdx.x % 32;
  float x[kPer], max = -INFINITY, total = 0;
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    x[i] = lane + 32 * i < p.experts ? __ldcg(logits + lane + 32 * i) : -INFINITY;
    max = x[i] > max ? x[i] : max;
  }
  max = warp_max(max);
#pragma unroll
  for (int i = 0; i < kPer; i++) total += x[i] = lane + 32 * i < p.experts ? exp_f32(x[i] - max) : 0;
  total = warp_sum(total);
  // Probabilities are not negative, so their bits are in their order; one more, so that 0 is none.
  uint32_t key[kPer];
#pragma unroll
  for (int i = 0; i < kPer; i++) key[i] = lane + 32 * i < p.experts ? bits_of(x[i] / total) + 1 : 0;
  float chosen = 0, mine = 0;  // lane k keeps the k-th (K <= 32)
  int index = 0;
#pragma unroll 1
  for (int k = 0; k < p.top_k; k++) {
    uint32_t best = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < kPer; i++)
      if (key[i] > best) best = key[i], at = i;
    const uint32_t most = __reduce_max_sync(~0u, best);
    const unsigned who = __reduce_min_sync(~0u, best == most ? static_cast<unsigned>(lane + 32 * at) : ~0u);
#pragma unroll
    for (int i = 0; i < kPer; i++)
      if (who == static_cast<unsigned>(lane + 32 * i)) key[i] = 0;
    if (lane == k) mine = float_of(most - 1), index = static_cast<int>(who);
    chosen += float_of(most - 1);
  }
  if (lane < p.top_k) {
    p.args.route_index[t * p.top_k + lane] = least(index, p.experts - 1);
    p.args.route_weight[t * p.top_k + lane] =
        mine / chosen * to_float(p.args.per_expert_scale[least(index, p.experts - 1)]);
  }
}

/// The same for any number of experts, in shared memory.
__device__ __noinline__ void choose_of_many(const float* logits, float* probability, const RouteParameters& p,
                                            int t) {
  const int lane = threadIdx.x % 32, experts = p.experts;
  float max = -INFINITY;
#pragma unroll 1
  for (int e = lane; e < experts; e += 32) {
    const float logit = probability[e] = __ldcg(logits + e);
    max = logit > max ? logit : max;
  }
  max = warp_max(max);
  float total = 0;
#pragma unroll 1
  for (int e = lane; e < experts; e += 32) total += probability[e] = exp_f32(probability[e] - max);
  total = warp_sum(total);
  // Every lane knows the best of its own experts. Probabilities are positive: their bits are in their order.
  uint32_t best = 0;
  int at = INT_MAX;
  const auto look = [&] {
    best = 0, at = INT_MAX;
#pragma unroll 1
    for (int e = lane; e < experts; e += 32)
      if (probability[e] >= 0 && (at == INT_MAX || bits_of(probability[e]) > best))
        best = bits_of(probability[e]), at = e;
  };
#pragma unroll 1
  for (int e = lane; e < experts; e += 32) probability[e] /= total;
  look();
  float chosen = 0, mine = 0;  // lane k keeps the k-th (K <= 32)
  int index = 0;
#pragma unroll 1
  for (int k = 0; k < p.top_k; k++) {
    const uint32_t most = __reduce_max_sync(~0u, best);
    unsigned who = __reduce_min_sync(~0u, best == most ? static_cast<unsigned>(at) : INT_MAX);
    if (who >= static_cast<unsigned>(experts))
      who = static_cast<unsigned>(k);  // not numbers: any expert, but a valid one
    if (lane == k) mine = float_of(most), index = static_cast<int>(who);
    chosen += float_of(most);
    if (static_cast<int>(who) != at) continue;
    probability[who] = -1;
    look();
  }
  if (lane < p.top_k) {
    p.args.route_index[t * p.top_k + lane] = index;
    p.args.route_weight[t * p.top_k + lane] = mine / chosen * to_float(p.args.per_expert_scale[index]);
  }
}

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
  extern __shared__ __align__(1024) char shared[];
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
      meet_block();
      const float* const z = p.args.normed + static_cast<int64_t>(first + from) * split.total;
      if (Aligned && p.bfloat16)
        load_columns<true>(columns, split, count, 1, z);
      else
        load_columns<false>(columns, split, count, planes, z);
      meet_block();
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
