// Routing of many tokens: a block a token for the norms, the router as a matrix op, a warp a token for the
// choice, a block an expert for the sorted list.
#include "ops/cuda/grouped/parts.cuh"
#include "ops/cuda/route.cuh"

namespace tp::cuda::grouped {

namespace {

template <int Per, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    norm_tokens(const __grid_constant__ RouteParameters p, Bf16* rounded) {
  __shared__ float room[kWarps];
  const RouteNorms<Per, Aligned> norms(p.args, p.split.total);
  wait_for_inputs();
  let_next_start();
  token_norms(p, norms, static_cast<int>(blockIdx.x), room);
  // A thread rounds what it has just written.
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.split.total;
  Row<Per, Aligned> z;
  z.load(p.args.normed + at, p.split.total);
#pragma unroll
  for (int i = 0; i < Per; i++)
    if (z.element(i) < p.split.total) *reinterpret_cast<uint4*>(rounded + at + z.element(i)) = pack(z.x[i]);
}

__global__ void __launch_bounds__(kThreads) choose_experts(const __grid_constant__ RouteParameters p) {
  TP_DYNAMIC_SHARED(float, probability, 4);  // (warps, experts) where there are many
  wait_for_inputs();
  let_next_start();
  const int warp = threadIdx.x / 32, t = blockIdx.x * (blockDim.x / 32) + warp;
  if (t >= p.tokens) return;
  const float* const logits = p.args.router_logits + static_cast<int64_t>(t) * p.experts;
  if (p.experts <= kFewExperts)
    choose(logits, p, t);
  else
    choose_of_many(logits, probability + warp * p.experts, p, t);
}

/// The assignments of expert blockIdx.x, by token. A thread looks at neighbouring assignments.
__global__ void __launch_bounds__(kThreads)
    sort_expert(const int* index, int* expert_start, int* assignment, int count) {
  __shared__ int before[kWarps], same[kWarps];
  wait_for_inputs();
  let_next_start();
  const int e = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int each = up((count + kThreads - 1) / kThreads, 4), first = threadIdx.x * each;
  const auto look = [&](auto&& see) {
#pragma unroll 2
    for (int i = first; i < min(first + each, count); i += 4) {
      const int rest = count - i;
      const int4 x = rest >= 4 ? *reinterpret_cast<const int4*>(index + i)
                               : make_int4(index[i], rest > 1 ? index[i + 1] : INT_MAX,
                                           rest > 2 ? index[i + 2] : INT_MAX, INT_MAX);
      see(i, x.x), see(i + 1, x.y), see(i + 2, x.z), see(i + 3, x.w);
    }
  };
  int lower = 0, mine = 0;
  look([&](int, int x) { lower += x < e, mine += x == e; });
  const int sum = sum_up_to_lane(mine);
  lower = __reduce_add_sync(~0u, lower);
  if (lane == 31) before[warp] = lower, same[warp] = sum;
  __syncthreads();
  int start = 0, at = sum - mine;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    start += before[w];
    if (w < warp) at += same[w];
  }
  if (threadIdx.x == 0) {
    expert_start[e] = start;
    if (e == 0) expert_start[gridDim.x] = count;
  }
  at += start;
  if (mine > 0)
    look([&](int i, int x) {
      if (x == e) assignment[at++] = i;
    });
}

}  // namespace

void route(const RouteArgs& a, const Dims& d, const Input& in, CudaBackend& backend) {
  const int T = in.tokens;
  RouteParameters r{};
  r.args = a;
  r.split = split_whole(d.hidden);
  r.tokens = T, r.experts = d.experts, r.top_k = d.top_k, r.eps = d.eps, r.bfloat16 = true;
  r.root = 1.0f / __builtin_sqrtf(static_cast<float>(d.hidden));
  Bf16* const normed = room_for(backend, int64_t{T} * d.hidden);
  with_row(d.hidden, [&]<int Per, bool Aligned>() {
    backend.launch(norm_tokens<Per, Aligned>, dim3(static_cast<unsigned>(T)), kThreads, 0, r, normed);
  });
  Parameters p{};
  // The router is no rank's shard: its rows are cut for the teams.
  const int parts = d.hidden % (Few16::kTeams * 64) == 0 ? Few16::kTeams : 1;
  p.part[0] = part_of<Few16, 64>(a.router, d.experts, d.hidden, parts, T, normed, a.router_logits, d.experts);
  p.parts = 1;
  launch_grouped<Few16, 64, Finish::sums>(backend, p);
  constexpr int kChoosers = 4;  // warps of a block
  backend.launch(choose_experts, dim3(static_cast<unsigned>((T + kChoosers - 1) / kChoosers)), kChoosers * 32,
                 d.experts > kFewExperts ? sizeof(float) * static_cast<size_t>(kChoosers * d.experts) : 0, r);
  backend.launch(sort_expert, dim3(static_cast<unsigned>(d.experts)), kThreads, 0, a.route_index,
                 a.expert_start, a.assignment, T * d.top_k);
}

}  // namespace tp::cuda::grouped
