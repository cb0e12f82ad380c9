// Down for any number of tokens: of few by down_few.cuh, of more as follows. Dense sums are joined where they
// are made. An expert's leaves are written for every assignment; a second kernel adds those of a token in the
// order of the experts' ids, leaf by leaf, and joins the leaves.
#include "ops/cuda/grouped/down_few.cuh"
#include "ops/cuda/grouped/parts.cuh"

namespace tp::cuda::grouped {

namespace {

constexpr int kJoinThreads = 128;
/// Most memory for the assignments' leaves; longer steps go slice by slice of the output.
constexpr int64_t kMostSums = int64_t{768} << 20;

/// A token's slots in the order of their experts' ids, and their weights. All threads call it.
__device__ inline void put_in_order(int* order, float* weight, const int* place, const float* route_weight,
                                    int t, int top_k) {
  const int k = threadIdx.x;
  if (k < top_k) {
    const int mine = place[t * top_k + k];
    int before = 0;
    for (int i = 0; i < top_k; i++) before += place[t * top_k + i] < mine;
    order[before] = k;
    weight[before] = route_weight[t * top_k + k];
  }
  __syncthreads();
}

/// sum[t][1][first + i] of `width` output columns, a thread four of them. sums: (T * K, leaves, width).
template <int Leaves>
__global__ void __launch_bounds__(kJoinThreads)
    add_experts(const float* sums, const int* place, const float* route_weight, float* sum, int top_k,
                int first, int width, int hidden) {
  __shared__ int order[32];
  __shared__ float weight[32];
  wait_for_inputs();
  let_next_start();
  const int t = blockIdx.y;
  put_in_order(order, weight, place, route_weight, t, top_k);
  const int i = (blockIdx.x * kJoinThreads + threadIdx.x) * 4;
  if (i >= width) return;
  float leaf[4][Leaves] = {};
#pragma unroll(Leaves > 4 ? 2 : 4)
  for (int n = 0; n < top_k; n++) {
    const float* const from = sums + (static_cast<int64_t>(t) * top_k + order[n]) * Leaves * width + i;
#pragma unroll
    for (int l = 0; l < Leaves; l++) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(from + l * width));
      leaf[0][l] = fused(weight[n], x.x, leaf[0][l]);
      leaf[1][l] = fused(weight[n], x.y, leaf[1][l]);
      leaf[2][l] = fused(weight[n], x.z, leaf[2][l]);
      leaf[3][l] = fused(weight[n], x.w, leaf[3][l]);
    }
  }
  *reinterpret_cast<float4*>(sum + (static_cast<int64_t>(t) * 2 + 1) * hidden + first + i) =
      make_float4(tree_sum(leaf[0], Leaves), tree_sum(leaf[1], Leaves), tree_sum(leaf[2], Leaves),
                  tree_sum(leaf[3], Leaves));
}

Parameters with_experts(const DownArgs& a, const Dims& d) {
  Parameters p{};
  p.experts = d.experts;
  p.expert_start = a.expert_start;
  p.assignment = a.assignment;
  p.token_of = divider(1);  // an assignment has a row of activations of its own
  return p;
}

template <class S>
Part dense_part(const DownArgs& a, const Dims& d, int tokens, const Bf16* act) {
  return part_of<S, 88>(a.down, d.hidden, d.inter, d.leaves, tokens, act, a.sum, 2 * int64_t{d.hidden});
}

template <class S>
Part expert_part(const DownArgs& a, const Dims& d, const Bf16* act, float* sums, int first, int width) {
  Part p = part_of<S, 88>(a.expert_down, d.experts * d.hidden, d.moe_inter, d.leaves, 0, act, sums,
                          int64_t{d.leaves} * width);
  p.rows = width;
  p.all_rows = d.hidden;
  p.first_row = first;
  p.leaf_stride = width;
  return p;
}

void join(const DownArgs& a, const Dims& d, int tokens, const float* sums, const int* place, int first,
          int width, CudaBackend& backend) {
  with_leaves(d.leaves, [&]<int Leaves>() {
    backend.launch(add_experts<Leaves>,
                   dim3(static_cast<unsigned>((width / 4 + kJoinThreads - 1) / kJoinThreads),
                        static_cast<unsigned>(tokens)),
                   kJoinThreads, 0, sums, place, a.route_weight, a.sum, d.top_k, first, width, d.hidden);
  });
}

}  // namespace

void down(const DownArgs& a, const Dims& d, const Input& in, CudaBackend& backend) {
  const int64_t dense = int64_t{in.tokens} * d.inter, experts = int64_t{in.tokens} * d.top_k * d.moe_inter;
  const int assignments = in.tokens * d.top_k;
  Bf16* const dense_act = room_for(backend, dense + experts);
  Bf16* const expert_act = dense_act + dense;
  const Rows dense_rows{a.dense_act, dense_act, dense}, expert_rows{a.expert_act, expert_act, experts};
  // The router's lists were done before gate_up's kernel could start this one.
  if (in.tokens <= kFew) {
    round_rows(backend, Next::at_once, dense_rows, expert_rows, {});
    few::down(a, d, in.tokens, dense_act, expert_act, backend);
    return;
  }
  auto* const place =
      static_cast<int*>(backend.workspace("places", static_cast<size_t>(assignments) * sizeof(int)));
  round_rows(backend, Next::at_once, dense_rows, expert_rows, {a.assignment, place, assignments});
  const auto sums_of = [&](int width) { return int64_t{assignments} * d.leaves * width * 4; };
  int slices = 1;
  while (sums_of(d.hidden / slices) > kMostSums && d.hidden % (2 * slices) == 0 &&
         d.hidden / (2 * slices) % 128 == 0)
    slices *= 2;
  const int width = d.hidden / slices;
  auto* const sums =
      static_cast<float*>(backend.workspace("assignments' leaves", static_cast<size_t>(sums_of(width))));
  Parameters p{};
  if (d.inter > 0) {
    p.part[0] = dense_part<Many64>(a, d, in.tokens, dense_act);
    p.parts = 1;
    launch_grouped<Many64, 88, Finish::sums>(backend, p);
  }
  for (int slice = 0; slice < slices; slice++) {
    p = with_experts(a, d);
    p.part[0] = expert_part<Many128>(a, d, expert_act, sums, slice * width, width);
    p.parts = 1;
    launch_grouped<Many128, 88, Finish::sums>(backend, p);
    join(a, d, in.tokens, sums, place, slice * width, width, backend);
  }
}

}  // namespace tp::cuda::grouped
