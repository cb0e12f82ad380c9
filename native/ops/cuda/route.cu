// The middle of a layer, by a cluster of 8 blocks for up to 8 tokens: a block takes a token's norms, then
// tiles of the router for all tokens, then a token's choice. The router's rows are on their way while the
// inputs are computed.
#include <cooperative_groups.h>

#include "ops/cuda/gemv.cuh"

namespace tp::cuda {

namespace {

constexpr int kCluster = 8;
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
template <int Per>
struct RouteNorms {
  Row<Per> post, dense, expert, scale;
  __device__ RouteNorms(const RouteArgs& a, int n) {
    post.load(a.post_norm, n), dense.load(a.dense_norm, n), expert.load(a.expert_norm, n),
        scale.load(a.scale, n);
  }
};

/// The residual after attention, the inputs of dense MLP and experts, and z, of one token, by one block.
template <int Per>
__device__ void token_norms(const RouteParameters& p, const RouteNorms<Per>& norms, int t, float* room) {
  const RouteArgs& a = p.args;
  const int n = p.split.total;
  const int64_t at = static_cast<int64_t>(t) * n;
  Row<Per> row, hidden;
  row.load(a.sum + at, n), hidden.load(a.hidden + at, n);
#pragma unroll
  for (int j = 0; j < Per; j++) row.x[j] = round_to(p.bfloat16, row.x[j]);
  float squares[1] = {row.squares()};
  block_sums(squares, room);
  const float of_branch = inverse_rms(squares[0], n, p.eps);
#pragma unroll
  for (int j = 0; j < Per; j++)
    row.x[j] =
        round_to(p.bfloat16, hidden.x[j] + round_to(p.bfloat16, row.x[j] * of_branch * norms.post.x[j]));
  squares[0] = row.squares();
  block_sums(squares, room);
  const float inverse = inverse_rms(squares[0], n, p.eps);
#pragma unroll
  for (int j = 0; j < Per; j++) {
    const int64_t i = at + row.index(j);
    if (row.index(j) >= n) continue;
    const float normed = row.x[j] * inverse;
    const float scaled = round_to(p.bfloat16, round_to(p.bfloat16, normed) * norms.scale.x[j]);
    a.normed[i] = round_to(p.bfloat16, scaled * p.root);
    a.hidden[i] = row.x[j];
    a.dense_in[i] = round_to(p.bfloat16, normed * norms.dense.x[j]);
    a.expert_in[i] = round_to(p.bfloat16, normed * norms.expert.x[j]);
  }
}

/// The K most probable experts of one token and their weights, by one warp. Equal probabilities: the lower
/// id.
__device__ void choose(const float* logits, float* probability, const RouteParameters& p, int t) {
  const int lane = threadIdx.x % 32, experts = p.experts;
  float max = -INFINITY;
  for (int e = lane; e < experts; e += 32) {
    const float logit = probability[e] = __ldcg(logits + e);
    max = logit > max ? logit : max;
  }
  max = warp_max(max);
  float total = 0;
  for (int e = lane; e < experts; e += 32) total += probability[e] = exp_f32(probability[e] - max);
  total = warp_sum(total);
  // Every lane knows the best of its own experts. Probabilities are positive: their bits are in their order.
  uint32_t best = 0;
  int at = INT_MAX;
  const auto look = [&] {
    best = 0, at = INT_MAX;
    for (int e = lane; e < experts; e += 32)
      if (probability[e] >= 0 && (at == INT_MAX || bits_of(probability[e]) > best))
        best = bits_of(probability[e]), at = e;
  };
  for (int e = lane; e < experts; e += 32) probability[e] /= total;
  look();
  float chosen = 0, mine = 0;  // lane k keeps the k-th (K <= 32)
  int index = 0;
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
    for (int i = 0; i < count; i++) before += index[i] < e;
    a.expert_start[e] = before;
  }
  for (int i = thread; i < count; i += threads) {
    const int expert = index[i];
    int before = 0;
    for (int j = 0; j < count; j++) before += index[j] < expert || (index[j] == expert && j < i);
    a.assignment[before] = i;
  }
}

/// The router's tiles of one block; a tile is read again for every pass over columns.
struct RouterTiles {
  const RouteParameters& p;
  int first, passes;
  __device__ const Split& split() const { return p.split; }
  __device__ int parts() const { return 1; }
  __device__ int tile(const Cursor& at) const { return first + at.tile / passes * kCluster; }
  __device__ Half low(const Cursor& at) const { return {&p.router, tile(at) * kTileRows}; }
  __device__ Half high(const Cursor& at) const { return {&p.router, tile(at) * kTileRows + 8}; }
};

template <int Per>
__global__ void __launch_bounds__(kThreads, 1) route_tokens(const __grid_constant__ RouteParameters p) {
  namespace cg = cooperative_groups;
  extern __shared__ __align__(128) char shared[];
  __shared__ float room[kWarps];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  const int first = static_cast<int>(blockIdx.x) / kCluster * kCluster,
            tokens = min(kCluster, p.tokens - first);
  const Place place(kSegments);
  const bool multiplies = threadIdx.x < kSegments * 32;
  // Shared memory: the ring of 8 warps, columns, exchange.
  auto* const columns =
      reinterpret_cast<Bf16*>(shared + kArrivalBytes + kSegments * p.slots * p.split.slot_bytes());
  auto* const exchange_room = reinterpret_cast<float*>(columns + kColumns * p.split.plane);
  Exchange exchange(exchange_room, place, kSegments);
  const int planes = p.bfloat16 ? 1 : 3, most = kColumns / planes, passes = (tokens + most - 1) / most;
  const int all_tiles = (p.experts + kTileRows - 1) / kTileRows;
  const int units = rank < all_tiles ? (all_tiles - rank + kCluster - 1) / kCluster * passes : 0;
  const RouterTiles work{p, rank, passes};
  Ring ring(shared, place, p.slots);
  if (multiplies) ring.fill(work, place, units);
  const RouteNorms<Per> norms(p.args, p.split.total);
  wait_for_inputs();
  let_next_start();
  if (rank < tokens) token_norms(p, norms, first + rank, room);
  cluster.sync();

  const int size = p.split.size(place.segment);
  for (Cursor at; at.tile < units; at.advance(1)) {
    const int from = at.tile % passes * most, count = min(most, tokens - from);
    __syncthreads();
    load_columns(columns, p.split, count, planes,
                 Plain{p.args.normed + static_cast<int64_t>(first + from) * p.split.total, p.split.total});
    __syncthreads();
    if (!multiplies) continue;
    const uint4* column = column_of(columns, p.split, place, count * planes);
    float even[4] = {}, odd[4] = {};
    for (int k = 0; k == 0 || k < size; k += p.split.chunk) {
      const Bf16* const slot = ring.pop(p.split);
      multiply_slot(even, odd, slot, p.split.chunk, column, size - k, place);
      ring.release();
      ring.push(work, place, units);
      if (column) column += p.split.chunk / 8;
    }
    for (int i = 0; i < 4; i++) even[i] += odd[i];
    exchange.give(place, even);
    for (int i = place.thread; i < kTileRows * count; i += place.threads) {
      const int row = work.tile(at) * kTileRows + i % kTileRows, t = i / kTileRows;
      if (row < p.experts)
        p.args.router_logits[static_cast<int64_t>(first + from + t) * p.experts + row] =
            exchange.at(i % kTileRows, t, planes);
    }
  }
  cluster.sync();
  if (rank < tokens && threadIdx.x < 32)
    choose(p.args.router_logits + static_cast<int64_t>(first + rank) * p.experts, exchange_room, p,
           first + rank);
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
  const size_t fixed = kArrivalBytes + kColumns * split.plane * sizeof(Bf16) + kExchangeBytes;
  const int room = (cuda.shared_memory() - 1024 - static_cast<int>(fixed)) / (kSegments * split.slot_bytes());
  const int slots =
      Split::min_of(Split::min_of(room, kMostSlots), (split.length + kUnit + split.chunk - 1) / split.chunk);
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
  with_row(d.hidden, [&]<int Per>() {
    cuda.launch_cluster(route_tokens<Per>, dim3(static_cast<unsigned>(clusters * kCluster)), kThreads,
                        fixed + static_cast<size_t>(kSegments * slots * split.slot_bytes()), kCluster, p);
  });
  if (one_cluster) return;
  const int work = in.tokens * d.top_k > d.experts ? in.tokens * d.top_k : d.experts + 1;
  cuda.launch(sort_assignments, dim3(static_cast<unsigned>((work + kThreads - 1) / kThreads)), kThreads, 0, a,
              in.tokens * d.top_k, d.experts);
}

}  // namespace tp::cuda
