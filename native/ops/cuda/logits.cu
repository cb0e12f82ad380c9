// Final norm, this rank's rows of the vocabulary head, softcap; then what every vocabulary leaf tells the
// sampler.
#include "ops/cuda/candidates.cuh"
#include "ops/cuda/gemv.cuh"
#include "ops/cuda/grouped/grouped.h"

namespace tp::cuda {

namespace {

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

/// One row of one leaf a block: its maximum, the sum of exponentials, the target's logit and the best
/// candidates.
__global__ void __launch_bounds__(kThreads)
    summarise(const float* logits, float* candidates, Dims d, Input in) {
  __shared__ float room[kWarps];
  __shared__ unsigned long long best_of[kWarps];
  wait_for_inputs();
  let_next_start();
  const int row = blockIdx.x / d.leaves, l = blockIdx.x % d.leaves, n = d.local_vocab / d.leaves;
  const int first = d.rank * d.local_vocab + l * n, stride = kSummaryFloats + kCandidateFloats * d.candidates;
  const float* const x = logits + static_cast<int64_t>(row) * d.local_vocab + l * n;
  float* const out = candidates + static_cast<int64_t>(blockIdx.x) * stride;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  float max = -INFINITY;
  for (int i = threadIdx.x; i < n; i += kThreads) max = x[i] > max ? x[i] : max;
  max = warp_max(max);
  if (lane == 0) room[warp] = max;
  __syncthreads();
  for (int w = 0; w < kWarps; w++) max = room[w] > max ? room[w] : max;
  __syncthreads();
  float sum[1] = {0};
  for (int i = threadIdx.x; i < n; i += kThreads) sum[0] += exp_f32(x[i] - max);
  block_sums(sum, room);
  if (threadIdx.x == 0) {
    const int target = in.target[row] - first;
    out[0] = max;
    out[1] = sum[0];
    out[2] = target >= 0 && target < n ? x[target] : -INFINITY;
  }

  // Unfiltered sampling needs the best perturbed logit alone; filters need the best logits and perturb later.
  const float temperature = in.temperature[row];
  const bool perturb = temperature > 0 && in.top_k[row] == 0 && in.top_p[row] >= 1;
  const auto position = static_cast<uint32_t>(in.position[in.row[row]]);
  auto* const list = reinterpret_cast<Candidate*>(out + kSummaryFloats);
  const auto score_of = [&](int i) {
    return perturb ? x[i] / temperature + gumbel(in.seed[row], static_cast<uint32_t>(in.sequence[row]),
                                                 position, static_cast<uint32_t>(first + i))
                   : x[i];
  };
  if (d.candidates >= n) {  // everything
    for (int i = threadIdx.x; i < d.candidates; i += kThreads)
      list[i] = i < n ? Candidate{score_of(i), x[i], static_cast<float>(first + i)} : nothing();
    return;
  }
  // One round a candidate: the best of those after the last one taken.
  unsigned long long taken = 0;
  for (int c = 0; c < d.candidates; c++) {
    unsigned long long best = ~0ull;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const unsigned long long key = key_of(score_of(i), static_cast<uint32_t>(first + i));
      if ((c == 0 || key > taken) && key < best) best = key;
    }
    best = block_min(best, best_of);
    taken = best;
    if (threadIdx.x == 0)
      list[c] = {score_of_key(best), x[token_of_key(best) - first], static_cast<float>(token_of_key(best))};
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
  of(backend).launch(summarise, dim3(static_cast<unsigned>(in.rows * d.leaves)), kThreads, 0, a.logits,
                     a.candidates, d, in);
}

}  // namespace tp::cuda
