// Input norm and the three projections as one list of tiles; then per head: norm, RoPE, and k and v into the
// cache.
#include "ops/cuda/gemv.cuh"

namespace tp::cuda {

namespace {

class Qkv {
 public:
  struct Parameters {
    QkvArgs args;
    Matrix q, k, v;
    Split split;
    Columns columns;
    float eps;
    __host__ __device__ int segments() const { return split.segments; }
    __host__ __device__ int slot_bytes() const { return split.slot_bytes(); }
    __host__ __device__ int bytes() const {
      return columns.tokens * columns.planes * split.plane * static_cast<int>(sizeof(Bf16));
    }
    __host__ __device__ int q_rows() const { return args.heads.heads * args.heads.head_dim; }
    __host__ __device__ int kv_rows() const { return args.heads.kv_heads * args.heads.head_dim; }
  };

  __device__ Qkv(const Parameters& p, const Place& place, float* exchange, char* memory)
      : p_(p),
        place_(place),
        room_(exchange),
        exchange_(exchange, place, p.split.segments),
        columns_(reinterpret_cast<Bf16*>(memory)),
        q_tiles_((p.q_rows() + kTileRows - 1) / kTileRows),
        kv_tiles_((p.kv_rows() + kTileRows - 1) / kTileRows) {
    prefetch(p.args.norm, p.split.total * static_cast<int>(sizeof(Bf16)));
  }

  __device__ int tiles() const { return place_.share(q_tiles_ + (p_.args.v_weight ? 2 : 1) * kv_tiles_); }
  __device__ int known() const { return tiles(); }
  __device__ int parts() const { return 1; }
  __device__ const Split& split() const { return p_.split; }
  __device__ void load() {
    const int n = p_.split.total;
    load_normed_columns(columns_, room_, p_.split, p_.columns.tokens, p_.columns.planes, p_.eps,
                        Normed{p_.args.hidden + static_cast<int64_t>(p_.columns.first) * n, nullptr,
                               p_.args.norm, n, p_.columns.planes == 1, nullptr});
  }
  __device__ Half low(const Cursor& at) const {
    const Tile t = tile(at);
    return {t.weight, t.first};
  }
  __device__ Half high(const Cursor& at) const {
    const Tile t = tile(at);
    return {t.weight, t.first + 8};
  }
  __device__ const uint4* column(const Cursor&) const {
    return column_of(columns_, p_.split, place_, p_.columns.tokens * p_.columns.planes);
  }
  __device__ void finish(const Cursor& at, const float (&sums)[4]) {
    const Tile to = tile(at);
    exchange_.give(place_, sums);
    for (int i = place_.thread; i < kTileRows * p_.columns.tokens; i += place_.threads) {
      const int row = to.first + i % kTileRows, t = i / kTileRows;
      if (row < to.rows)
        to.out[static_cast<int64_t>(p_.columns.first + t) * to.stride + row] =
            round_to(p_.columns.planes == 1, exchange_.at(i % kTileRows, t, p_.columns.planes));
    }
  }

 private:
  struct Tile {
    const Matrix* weight;
    float* out;
    int first, rows, stride;
  };
  __device__ Tile tile(const Cursor& at) const {
    const int i = place_.global_group + at.tile * place_.groups, kv = p_.kv_rows();
    if (i < q_tiles_) return {&p_.q, p_.args.q, i * kTileRows, p_.q_rows(), p_.q_rows()};
    const int first = (i - q_tiles_) % kv_tiles_ * kTileRows;
    if (i < q_tiles_ + kv_tiles_) return {&p_.k, p_.args.kv, first, kv, 2 * kv};
    return {&p_.v, p_.args.kv + kv, first, kv, 2 * kv};
  }

  const Parameters& p_;
  const Place& place_;
  float* room_;
  Exchange exchange_;
  Bf16* columns_;
  int q_tiles_, kv_tiles_;
};

constexpr int kHeadWarps = 8;

struct HeadParameters {
  QkvArgs args;
  const int* slot;
  const int* position;
  int tokens;
  float eps;
  bool bfloat16;
};

/// (mean(x^2) + eps)^-1/2 of one head, by one warp.
__device__ float head_inverse(const float* x, int dim, float eps) {
  float squares = 0;
  for (int i = threadIdx.x % 32; i < dim; i += 32) squares = fused(x[i], x[i], squares);
  return inverse_rms(warp_sum(squares), dim, eps);
}

/// A warp takes one head of one token: a query head in place, or a key and its value into the cache.
__global__ void __launch_bounds__(kHeadWarps * 32) finish_heads(const __grid_constant__ HeadParameters p) {
  wait_for_inputs();
  let_next_start();
  const Heads& h = p.args.heads;
  const int dim = h.head_dim, half = dim / 2, all = h.heads + h.kv_heads;
  const int task = blockIdx.x * kHeadWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (task >= p.tokens * all) return;
  const int t = task / all, head = task % all;
  const float* const cosine = p.args.cosine + static_cast<int64_t>(t) * h.rotary_pairs;
  const float* const sine = p.args.sine + static_cast<int64_t>(t) * h.rotary_pairs;
  const bool query = head < h.heads;
  const int kv_rows = h.kv_heads * dim, kv_head = head - h.heads;
  float* const x = query ? p.args.q + (static_cast<int64_t>(t) * h.heads + head) * dim
                         : p.args.kv + static_cast<int64_t>(t) * 2 * kv_rows + kv_head * dim;
  const int64_t at = query
                         ? 0
                         : ((static_cast<int64_t>(p.slot[t]) * h.kv_heads + kv_head) * p.args.cache.capacity +
                            p.position[t] % p.args.cache.capacity) *
                               dim;
  const auto to_cache = [&](void* cache, int i, float value) {
    if (p.bfloat16)
      static_cast<Bf16*>(cache)[at + i] = to_bf16(value);
    else
      static_cast<float*>(cache)[at + i] = value;
  };
  if (!query) {
    const float* const v = p.args.v_weight ? x + kv_rows : x;  // the raw k where there is no v projection
    const float inverse = head_inverse(v, dim, p.eps);
    for (int i = lane; i < dim; i += 32) to_cache(p.args.cache.v, i, round_to(p.bfloat16, v[i] * inverse));
  }
  const float inverse = head_inverse(x, dim, p.eps);
  const Bf16* const weight = query ? p.args.q_norm : p.args.k_norm;
  __syncwarp();
  for (int i = lane; i < half; i += 32) {
    float a = round_to(p.bfloat16, x[i] * inverse * to_float(weight[i]));
    float b = round_to(p.bfloat16, x[i + half] * inverse * to_float(weight[i + half]));
    if (i < h.rotary_pairs) {
      const float a0 = a;
      a = round_to(p.bfloat16, fused(a0, cosine[i], -(b * sine[i])));
      b = round_to(p.bfloat16, fused(b, cosine[i], a0 * sine[i]));
    }
    if (query) {
      x[i] = a;
      x[i + half] = b;
    } else {
      to_cache(p.args.cache.k, i, a);
      to_cache(p.args.cache.k, i + half, b);
    }
  }
}

}  // namespace

void qkv(const QkvArgs& a, const Dims& d, const Input& in, Backend& backend) {
  CudaBackend& cuda = of(backend);
  const Split split = split_whole(d.hidden);
  const int q_rows = a.heads.heads * a.heads.head_dim, kv_rows = a.heads.kv_heads * a.heads.head_dim;
  launch_gemv<Qkv>(cuda, d, in.tokens,
                   {a,
                    matrix_of(a.q_weight, q_rows, split),
                    matrix_of(a.k_weight, kv_rows, split),
                    matrix_of(a.v_weight ? a.v_weight : a.k_weight, kv_rows, split),
                    split,
                    {},
                    d.eps});
  const int tasks = in.tokens * (a.heads.heads + a.heads.kv_heads);
  cuda.launch(finish_heads, dim3(static_cast<unsigned>((tasks + kHeadWarps - 1) / kHeadWarps)),
              kHeadWarps * 32, 0, HeadParameters{a, in.slot, in.position, in.tokens, d.eps, d.bfloat16});
}

}  // namespace tp::cuda
