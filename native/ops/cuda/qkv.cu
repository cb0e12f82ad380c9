// Input norm and the three projections as one list of tiles; then per head: norm, RoPE, and k and v into the
// cache.
#include "ops/cuda/gemv.cuh"

namespace tp::cuda {

namespace {

struct QkvParameters {
  QkvArgs args;
  Matrix q, k, v;
  Split split;
  Columns columns;
  int q_rows, kv_rows, q_tiles, kv_tiles, tiles;
  float eps;
  __host__ __device__ int segments() const { return split.segments; }
  __host__ __device__ int slot_bytes() const { return split.slot_bytes(); }
  bool aligned() const { return split.aligned; }
  __host__ __device__ int bytes() const {
    return columns.tokens * columns.planes * split.plane * static_cast<int>(sizeof(Bf16));
  }
};

template <bool Fast>
class Qkv {
 public:
#ifdef TP_TIMELINE
  static constexpr const char* kName = "qkv";
#endif
  using Parameters = QkvParameters;

  __device__ Qkv(const Parameters& p, const Place& place, float* exchange, char* memory)
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
  __device__ Tile rows(const Cursor& at) const {
    const Target t = target(at);
    return {{t.weight, t.first}, {}};
  }
  __device__ void early() { prefetch(p_.args.norm, p_.split.total * static_cast<int>(sizeof(Bf16))); }
  __device__ void list() {}
  __device__ void load() {
    load_normed_columns<Fast>(columns_, room_, p_.split, p_.columns.tokens, p_.columns.planes, p_.eps,
                              p_.args.hidden + static_cast<int64_t>(p_.columns.first) * p_.split.total,
                              nullptr, p_.args.norm);
  }
  __device__ void enter(const Cursor&) {}
  __device__ const uint4* column() const {
    return column_of(columns_, p_.split, place_, p_.columns.tokens * p_.columns.planes);
  }
  __device__ void finish(const Cursor& at, const float (&sums)[4]) {
    const Target to = target(at);
    exchange_.give(place_, sums);
#pragma unroll 1
    for (int i = place_.thread; i < kTileRows * p_.columns.tokens; i += place_.threads) {
      const int row = to.first + i % kTileRows, t = i / kTileRows;
      if (row < to.rows)
        to.out[static_cast<int64_t>(p_.columns.first + t) * to.stride + row] = round_to(
            Fast || p_.columns.planes == 1, exchange_.template at<Fast>(i % kTileRows, t, p_.columns.planes));
    }
  }

 private:
  struct Target {
    const Matrix* weight;
    float* out;
    int first, rows, stride;
  };
  __device__ Target target(const Cursor& at) const {
    const int i = place_.global_group + at.tile * place_.groups, j = i - p_.q_tiles, kv = p_.kv_rows;
    if (j < 0) return {&p_.q, p_.args.q, i * kTileRows, p_.q_rows, p_.q_rows};
    if (j < p_.kv_tiles) return {&p_.k, p_.args.kv, j * kTileRows, kv, 2 * kv};
    return {&p_.v, p_.args.kv + kv, (j - p_.kv_tiles) * kTileRows, kv, 2 * kv};
  }

  const Parameters& p_;
  const Place& place_;
  float* room_;
  Exchange exchange_;
  Bf16* columns_;
  int tiles_;
};

constexpr int kHeadWarps = 4;

struct HeadParameters {
  QkvArgs args;
  const int* slot;
  const int* position;
  float eps;
  bool bfloat16;
};

/// (mean(x^2) + eps)^-1/2 of one head, by one warp.
__device__ float head_inverse(const float* x, int dim, float eps) {
  float squares = 0;
#pragma unroll 2
  for (int i = threadIdx.x % 32; i < dim; i += 32) squares = fused(x[i], x[i], squares);
  return inverse_rms(warp_sum(squares), dim, eps);
}

__device__ inline void to_cache(void* cache, int64_t at, float value, bool bfloat16) {
  if (bfloat16)
    static_cast<Bf16*>(cache)[at] = to_bf16(value);
  else
    static_cast<float*>(cache)[at] = value;
}

/// A warp takes one head of one token (blockIdx.y): a query head in place, or a key and its value into the
/// cache.
__global__ void __launch_bounds__(kHeadWarps * 32) finish_heads(const __grid_constant__ HeadParameters p) {
  TP_MARKS;
  TP_MARK(0);
  const Heads& h = p.args.heads;
  const int dim = h.head_dim, half = dim / 2, t = blockIdx.y;
  const int head = blockIdx.x * kHeadWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool query = head < h.heads;
  const int kv_rows = h.kv_heads * dim, kv_head = head - h.heads;
  const Bf16* const weight = query ? p.args.q_norm : p.args.k_norm;
  float* const x = query ? p.args.q + (static_cast<int64_t>(t) * h.heads + head) * dim
                         : p.args.kv + static_cast<int64_t>(t) * 2 * kv_rows + kv_head * dim;
  wait_for_inputs();
  TP_MARK(1);
  let_next_start();
  if (head >= h.heads + h.kv_heads) return;
  const float* const cosine = p.args.cosine + static_cast<int64_t>(t) * h.rotary_pairs;
  const float* const sine = p.args.sine + static_cast<int64_t>(t) * h.rotary_pairs;
  int64_t at = 0;
  if (!query) {
    int position = p.position[t];
    if (position >= p.args.cache.capacity) position %= p.args.cache.capacity;
    at = ((static_cast<int64_t>(p.slot[t]) * h.kv_heads + kv_head) * p.args.cache.capacity + position) * dim;
    const float* const v = p.args.v_weight ? x + kv_rows : x;  // the raw k where there is no v projection
    const float inverse = head_inverse(v, dim, p.eps);
#pragma unroll 2
    for (int i = lane; i < dim; i += 32)
      to_cache(p.args.cache.v, at + i, round_to(p.bfloat16, v[i] * inverse), p.bfloat16);
  }
  const float inverse = head_inverse(x, dim, p.eps);
  __syncwarp();
#pragma unroll 2
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
      to_cache(p.args.cache.k, at + i, a, p.bfloat16);
      to_cache(p.args.cache.k, at + i + half, b, p.bfloat16);
    }
  }
  TP_MARK(6);
  TP_SAY("heads", 0);
}

}  // namespace

void qkv(const QkvArgs& a, const Dims& d, const Input& in, Backend& backend) {
  CudaBackend& cuda = of(backend);
  const Split split = split_whole(d.hidden);
  const int q_rows = a.heads.heads * a.heads.head_dim, kv_rows = a.heads.kv_heads * a.heads.head_dim;
  const int q_tiles = tiles_of(q_rows), kv_tiles = tiles_of(kv_rows);
  launch_gemv<Qkv>(cuda, d, in.tokens,
                   {a,
                    matrix_of(a.q_weight, q_rows, split),
                    matrix_of(a.k_weight, kv_rows, split),
                    matrix_of(a.v_weight ? a.v_weight : a.k_weight, kv_rows, split),
                    split,
                    {},
                    q_rows,
                    kv_rows,
                    q_tiles,
                    kv_tiles,
                    q_tiles + (a.v_weight ? 2 : 1) * kv_tiles,
                    d.eps});
  const int heads = a.heads.heads + a.heads.kv_heads;
  cuda.launch(
      finish_heads,
      dim3(static_cast<unsigned>((heads + kHeadWarps - 1) / kHeadWarps), static_cast<unsigned>(in.tokens)),
      kHeadWarps * 32, 0, HeadParameters{a, in.slot, in.position, d.eps, d.bfloat16});
}

}  // namespace tp::cuda
