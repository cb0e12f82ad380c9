// Final norm, this rank's rows of the vocabulary head, softcap; then what every vocabulary leaf tells the
// sampler.
#include <cooperative_groups.h>

#include "ops/cuda/candidates.cuh"
#include "ops/cuda/gemv.cuh"
#include "ops/cuda/grouped/grouped.h"

namespace tp::cuda {

namespace {

namespace cg = cooperative_groups;

struct LogitsParameters {
  LogitsArgs args;
  Matrix table;
  Split split;
  Columns columns;
  const int* row;
  int rows, tiles;
  float eps, softcap;
  __host__ __device__ int segments() const { return split.segments; }
  __host__ __device__ int slot_bytes() const { return split.slot_bytes(); }
  bool aligned() const { return split.aligned && split.total <= kMostNormed; }
  __host__ __device__ int bytes() const {
    return columns.tokens * columns.planes * split.plane * static_cast<int>(sizeof(Bf16));
  }
};

template <bool Fast>
class Logits {
 public:
  using Parameters = LogitsParameters;

  __device__ Logits(const Parameters& p, const Place& place, float* exchange, char* memory)
      : p_(p),
        place_(place),
        room_(exchange),
        exchange_(exchange, place, p.split.segments),
        columns_(reinterpret_cast<Bf16*>(memory)),
        tiles_(place.share(p.tiles)) {}

  __device__ int tiles() const { return tiles_; }
  __device__ int known() const { return tiles_; }
  __device__ bool all_known() const { return true; }
  __device__ int parts() const { return 1; }
  __device__ const Split& split() const { return p_.split; }
  __device__ Tile rows(const Cursor& at) const { return {{&p_.table, first_row(at)}, {}}; }
  __device__ void early() { prefetch(p_.args.norm, p_.split.total * static_cast<int>(sizeof(Bf16))); }
  __device__ void list() {}
  __device__ void load() {
    load_normed_columns<Fast>(columns_, room_, p_.split, p_.columns.tokens, p_.columns.planes, p_.eps,
                              p_.args.hidden, p_.row + p_.columns.first, p_.args.norm);
  }
  __device__ void enter(const Cursor&) {}
  __device__ const uint4* column() const {
    return column_of(columns_, p_.split, place_, p_.columns.tokens * p_.columns.planes);
  }
  __device__ void finish(const Cursor& at, const float (&sums)[4]) {
    exchange_.give(place_, sums);
#pragma unroll 1
    for (int i = place_.thread; i < kTileRows * p_.columns.tokens; i += place_.threads) {
      const int row = first_row(at) + i % kTileRows, r = i / kTileRows;
      if (row >= p_.rows) continue;
      const float x = exchange_.template at<Fast>(i % kTileRows, r, p_.columns.planes);
      p_.args.logits[static_cast<int64_t>(p_.columns.first + r) * p_.rows + row] =
          p_.softcap > 0 ? p_.softcap * tanh_f32(x / p_.softcap) : x;
    }
  }

 private:
  __device__ int first_row(const Cursor& at) const {
    return (place_.global_group + at.tile * place_.groups) * kTileRows;
  }

  const Parameters& p_;
  const Place& place_;
  float* room_;
  Exchange exchange_;
  Bf16* columns_;
  int tiles_;
};

/// Blocks of a cluster, which share a leaf of a row.
constexpr int kSharing = 8;

/// What every block of the cluster has found, given to all. Two turns, since a block may be a turn ahead.
template <class Value>
class Exchanged {
 public:
  __device__ explicit Exchanged(Value (*room)[kSharing]) : room_(room) {}
  /// Called by all threads; `own` is the block's value, known to its first threads.
  __device__ Value* all(const cg::cluster_group& cluster, Value own) {
    turn_ ^= 1;
    Value* const to = &room_[turn_][cluster.block_rank()];
    if (threadIdx.x < kSharing) *cluster.map_shared_rank(to, threadIdx.x) = own;
    cluster.sync();
    return room_[turn_];
  }

 private:
  Value (*room_)[kSharing];
  int turn_ = 0;
};

struct Best {
  unsigned long long key;
  float max;
};

/// One row of one leaf a cluster: its maximum, the sum of exponentials, the target's logit and the best
/// candidates.
__global__ void __launch_bounds__(kThreads)
    summarise(const float* logits, float* candidates, Dims d, Input in) {
  __shared__ float room[kWarps], sums[2][kSharing];
  __shared__ unsigned long long best_of[kWarps];
  __shared__ Best bests[2][kSharing];
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();  // all of it is there: its shared memory may be written to
  wait_for_inputs();
  let_next_start();
  const int which = blockIdx.x / kSharing, row = which / d.leaves, l = which % d.leaves;
  const int n = d.local_vocab / d.leaves, first = d.rank * d.local_vocab + l * n;
  const float* const x = logits + static_cast<int64_t>(row) * d.local_vocab + l * n;
  float* const out =
      candidates + static_cast<int64_t>(which) * (kSummaryFloats + kCandidateFloats * d.candidates);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = static_cast<int>(cluster.block_rank()) * kThreads + static_cast<int>(threadIdx.x);
  constexpr int kStep = kSharing * kThreads;
  const bool writes = begin == 0;

  // Unfiltered sampling needs the best perturbed logit alone; filters need the best logits and perturb later.
  const float temperature = in.temperature[row];
  const bool perturb = temperature > 0 && in.top_k[row] == 0 && in.top_p[row] >= 1;
  const auto position = static_cast<uint32_t>(in.position[in.row[row]]);
  const auto score_of = [&](int i) {
    return perturb ? x[i] / temperature + gumbel(in.seed[row], static_cast<uint32_t>(in.sequence[row]),
                                                 position, static_cast<uint32_t>(first + i))
                   : x[i];
  };
  Exchanged<Best> best_exchanged(bests);
  // The best of those after `taken`, of which there are none at first, and the largest logit.
  const auto look = [&](bool any, unsigned long long taken) {
    float max = -INFINITY;
    unsigned long long best = ~0ull;
#pragma unroll 4
    for (int i = begin; i < n; i += kStep) {
      const unsigned long long key = key_of(score_of(i), static_cast<uint32_t>(first + i));
      if ((any || key > taken) && key < best) best = key;
      max = x[i] > max ? x[i] : max;
    }
    max = warp_max(max);
    if (lane == 0) room[warp] = max;
    best = block_min(best, best_of);
    for (int w = 0; w < kWarps; w++) max = room[w] > max ? room[w] : max;
    const Best* const all = best_exchanged.all(cluster, {best, max});
    Best found = all[0];
    for (int b = 1; b < kSharing; b++)
      found = {all[b].key < found.key ? all[b].key : found.key,
               all[b].max > found.max ? all[b].max : found.max};
    return found;
  };
  Best found = look(true, 0);

  float sum[1] = {0};
#pragma unroll 4
  for (int i = begin; i < n; i += kStep) sum[0] += exp_f32(x[i] - found.max);
  block_sums(sum, room);
  float* const of_blocks = Exchanged<float>(sums).all(cluster, sum[0]);
  if (writes) {
    const int target = in.target[row] - first;
    out[0] = found.max;
    out[1] = tree_sum(of_blocks, kSharing);
    out[2] = target >= 0 && target < n ? x[target] : -INFINITY;
  }

  auto* const list = reinterpret_cast<Candidate*>(out + kSummaryFloats);
  if (d.candidates >= n) {  // everything
    for (int i = begin; i < d.candidates; i += kStep)
      list[i] = i < n ? Candidate{score_of(i), x[i], static_cast<float>(first + i)} : nothing();
    return;
  }
  for (int c = 0; c < d.candidates; c++) {
    if (c > 0) found = look(false, found.key);
    if (writes)
      list[c] = {score_of_key(found.key), x[token_of_key(found.key) - first],
                 static_cast<float>(token_of_key(found.key))};
  }
}

}  // namespace

void logits(const LogitsArgs& a, const Dims& d, const Input& in, Backend& backend) {
  if (in.rows == 0) return;
  CudaBackend& cuda = of(backend);
  const Split split = split_whole(d.hidden);
  if (grouped::takes(a, d, in.rows))
    grouped::head(a, d, in, cuda);
  else
    launch_gemv<Logits>(cuda, d, in.rows,
                        {a,
                         matrix_of(a.table, d.local_vocab, split),
                         split,
                         {},
                         in.row,
                         d.local_vocab,
                         tiles_of(d.local_vocab),
                         d.eps,
                         d.softcap});
  summarise_logits(a, d, in, backend);
}

void summarise_logits(const LogitsArgs& a, const Dims& d, const Input& in, Backend& backend) {
  if (in.rows == 0) return;
  of(backend).launch_cluster(summarise, dim3(static_cast<unsigned>(in.rows * d.leaves * kSharing)), kThreads,
                             0, kSharing, a.logits, a.candidates, d, in);
}

}  // namespace tp::cuda
