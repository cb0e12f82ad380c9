// The middle of a layer, by a cluster of 8 blocks for up to 8 tokens: a block takes a token's norms, then 16 rows of the
// router for all tokens, then a token's choice. The router's rows are on their way while the inputs are computed.
#include <cooperative_groups.h>

#include "ops/cuda/gemv.cuh"

namespace tp::cuda {

namespace {

constexpr int kCluster = 8;
static_assert(kCluster == kChunk);

struct RouteParameters {
  RouteArgs args;
  Split split;
  int tokens, experts, top_k;
  float eps, root;  // root: H^-1/2
  bool bfloat16, sort;
};

/// The residual after attention, the inputs of dense MLP and experts, and z, of one token, by one block.
__device__ void token_norms(const RouteParameters& p, int t, float* row, float* room) {
  const RouteArgs& a = p.args;
  const int n = p.split.total;
  const int64_t at = static_cast<int64_t>(t) * n;
  float squares[1] = {0};
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float x = row[i] = round_to(p.bfloat16, a.sum[at + i]);
    squares[0] = fused(x, x, squares[0]);
  }
  block_sums(squares, room);
  const float of_branch = inverse_rms(squares[0], n, p.eps);
  squares[0] = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float branch = round_to(p.bfloat16, row[i] * of_branch * to_float(a.post_norm[i]));
    const float m = row[i] = a.hidden[at + i] = round_to(p.bfloat16, a.hidden[at + i] + branch);
    squares[0] = fused(m, m, squares[0]);
  }
  block_sums(squares, room);
  const float inverse = inverse_rms(squares[0], n, p.eps);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float normed = row[i] * inverse;
    a.dense_in[at + i] = round_to(p.bfloat16, normed * to_float(a.dense_norm[i]));
    a.expert_in[at + i] = round_to(p.bfloat16, normed * to_float(a.expert_norm[i]));
    const float scaled = round_to(p.bfloat16, round_to(p.bfloat16, normed) * to_float(a.scale[i]));
    a.normed[at + i] = round_to(p.bfloat16, scaled * p.root);
  }
}

/// The K most probable experts of one token and their weights, by one warp. Equal probabilities: the lower id.
__device__ void choose(const float* logits, float* probability, const RouteParameters& p, int t) {
  const int lane = threadIdx.x % 32, experts = p.experts;
  float max = -INFINITY;
  for (int e = lane; e < experts; e += 32) max = logits[e] > max ? logits[e] : max;
  max = warp_max(max);
  float total = 0;
  for (int e = lane; e < experts; e += 32) total += probability[e] = exp_f32(logits[e] - max);
  total = warp_sum(total);
  for (int e = lane; e < experts; e += 32) probability[e] /= total;
  float chosen = 0, mine = 0;  // lane k keeps the k-th (K <= 32)
  int index = 0;
  for (int k = 0; k < p.top_k; k++) {
    float best = -1;
    int at = INT_MAX;
    for (int e = lane; e < experts; e += 32)
      if (probability[e] > best) best = probability[e], at = e;
    for (int span = 16; span > 0; span /= 2) {
      const float other = __shfl_xor_sync(~0u, best, span);
      const int other_at = __shfl_xor_sync(~0u, at, span);
      if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    if (at >= experts) at = k;  // probabilities that are not numbers: any expert, but a valid one
    if (lane == at % 32) probability[at] = -1;
    if (lane == k) mine = best, index = at;
    chosen += best;
  }
  if (lane < p.top_k) {
    p.args.route_index[t * p.top_k + lane] = index;
    p.args.route_weight[t * p.top_k + lane] = mine / chosen * to_float(p.args.per_expert_scale[index]);
  }
}

/// Sorts `count` assignments by expert, then by token: entry i of thread i and on. Quadratic, but all at once.
__device__ void sort_by_expert(const RouteArgs& a, int count, int experts, int thread, int threads) {
  for (int e = thread; e <= experts; e += threads) {
    int before = 0;
    for (int i = 0; i < count; i++) before += __ldcg(a.route_index + i) < e;
    a.expert_start[e] = before;
  }
  for (int i = thread; i < count; i += threads) {
    const int expert = __ldcg(a.route_index + i);
    int before = 0;
    for (int j = 0; j < count; j++) {
      const int other = __ldcg(a.route_index + j);
      before += other < expert || (other == expert && j < i);
    }
    a.assignment[before] = i;
  }
}

__global__ void __launch_bounds__(kThreads, 1) route_tokens(const __grid_constant__ RouteParameters p) {
  namespace cg = cooperative_groups;
  extern __shared__ uint4 shared[];
  __shared__ float room[kWarps];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  const int first = static_cast<int>(blockIdx.x) / kCluster * kCluster, tokens = min(kCluster, p.tokens - first);
  const int steps = (p.split.length + 31) / 32, tiles = (p.experts + kTileRows - 1) / kTileRows;
  const Place place(kSegments);
  const bool multiplies = threadIdx.x < kSegments * 32;
  // Shared memory: the tile (8 warps x steps), columns, exchange; the norms' row lies where the columns will.
  uint4* const mine = shared + (threadIdx.x / 32) * steps * 64 + place.lane;
  auto* const columns = reinterpret_cast<Bf16*>(shared + kSegments * steps * 64);
  const auto fetch_tile = [&](int tile) {
    const Rows rows = rows_of(p.args.router, p.split, place, tile * kTileRows, p.experts);
    for (int s = 0; s < steps; s++) {
      const int k = s * 32 + place.quarter * 8, valid = max(0, min(8, rows.length - k));
      fetch(mine + s * 64, rows, rows.low + k, valid);
      fetch(mine + s * 64 + 32, rows, rows.high + k, valid);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if (multiplies && rank < tiles) fetch_tile(rank);
  wait_for_inputs();
  let_next_start();
  if (rank < tokens) token_norms(p, first + rank, reinterpret_cast<float*>(columns), room);
  cluster.sync();

  const int planes = p.bfloat16 ? 1 : 3, most = kColumns / planes;
  auto* const exchange_room = reinterpret_cast<float*>(columns + kColumns * p.split.plane);
  Exchange exchange(exchange_room, place, kSegments);
  for (int tile = rank; tile < tiles; tile += kCluster) {
    if (tile != rank && multiplies) fetch_tile(tile);
    for (int from = 0; from < tokens; from += most) {
      const int count = min(most, tokens - from);
      __syncthreads();
      load_columns(columns, p.split, count, planes,
                   Plain{p.args.normed + static_cast<int64_t>(first + from) * p.split.total, p.split.total});
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();
      if (!multiplies) continue;
      const uint4* const column = column_of(columns, p.split, place, count * planes);
      float even[4] = {}, odd[4] = {};
      for (int s = 0; s < steps; s++) {
        const uint4 low = mine[s * 64], high = mine[s * 64 + 32];
        uint4 x = {0, 0, 0, 0};
        if (column) x = column[s * 4];
        multiply(even, low.x, high.x, low.y, high.y, x.x, x.y);
        multiply(odd, low.z, high.z, low.w, high.w, x.z, x.w);
      }
      for (int i = 0; i < 4; i++) even[i] += odd[i];
      exchange.give(place, even);
      for (int i = place.thread; i < kTileRows * count; i += place.threads) {
        const int row = tile * kTileRows + i % kTileRows, t = i / kTileRows;
        if (row < p.experts)
          p.args.router_logits[static_cast<int64_t>(first + from + t) * p.experts + row] = exchange.at(i % kTileRows, t, planes);
      }
    }
  }
  cluster.sync();
  if (rank < tokens && threadIdx.x < 32)
    choose(p.args.router_logits + static_cast<int64_t>(first + rank) * p.experts, exchange_room, p, first + rank);
  if (!p.sort) return;
  cluster.sync();
  if (rank == 0) sort_by_expert(p.args, tokens * p.top_k, p.experts, threadIdx.x, kThreads);
}

__global__ void __launch_bounds__(kThreads) sort_assignments(RouteArgs a, int count, int experts) {
  wait_for_inputs();
  let_next_start();
  sort_by_expert(a, count, experts, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
}

}  // namespace

void route(const RouteArgs& a, const Dims& d, const Input& in, Backend& backend) {
  CudaBackend& cuda = of(backend);
  const Split split = split_whole(d.hidden);
  const bool one_cluster = in.tokens <= kCluster;
  const size_t tile = kSegments * ((split.length + 31) / 32) * 64 * sizeof(uint4);
  const size_t shared = tile + kColumns * split.plane * sizeof(Bf16) + kExchangeBytes;
  const int clusters = (in.tokens + kCluster - 1) / kCluster;
  cuda.launch_cluster(route_tokens, dim3(static_cast<unsigned>(clusters * kCluster)), kThreads, shared, kCluster,
                      RouteParameters{a, split, in.tokens, d.experts, d.top_k, d.eps,
                                      1.0f / __builtin_sqrtf(static_cast<float>(d.hidden)), d.bfloat16, one_cluster});
  if (one_cluster) return;
  const int work = in.tokens * d.top_k > d.experts ? in.tokens * d.top_k : d.experts + 1;
  cuda.launch(sort_assignments, dim3(static_cast<unsigned>((work + kThreads - 1) / kThreads)), kThreads, 0, a,
              in.tokens * d.top_k, d.experts);
}

}  // namespace tp::cuda
