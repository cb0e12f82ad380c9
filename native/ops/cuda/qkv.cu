// Input norm and the three projections as one list of tiles; then per head: norm, RoPE, and k and v into the
// cache.
#include "ops/cuda/gemv.cuh"
#include "ops/cuda/grouped/grouped.h"

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
  bool aligned() const { return split.aligned && split.total <= kMostNormed; }
  __host__ __device__ int bytes() const {
    return columns.tokens * columns.planes * split.plane * static_cast<int>(sizeof(Bf16));
  }
};

template <bool Fast>
class Qkv {
 public:
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

/// Four neighbours; past `n` zeros.
__device__ inline float4 four(const float* from, int i, int n) {
  return i < n ? *reinterpret_cast<const float4*>(from + i) : make_float4(0, 0, 0, 0);
}
__device__ inline float4 four(const Bf16* from, int i, int n) {
  if (i >= n) return make_float4(0, 0, 0, 0);
  const uint2 raw = *reinterpret_cast<const uint2*>(from + i);
  return make_float4(float_of(raw.x << 16), float_of(raw.x & 0xffff0000u), float_of(raw.y << 16),
                     float_of(raw.y & 0xffff0000u));
}
__device__ inline float squares(float4 x) {
  return fused(x.x, x.x, fused(x.y, x.y, fused(x.z, x.z, x.w * x.w)));
}

/// A warp takes one head of one token (blockIdx.y): a query head in place, or a key and its value into the
/// cache. A lane keeps 4 neighbours of either half of the head, so that pairs that rotate are its own; dim <=
/// 512, a multiple of 8.
__global__ void __launch_bounds__(kHeadWarps * 32) finish_heads(const __grid_constant__ HeadParameters p) {
  constexpr int kPer = 2;
  const Heads& h = p.args.heads;
  const int dim = h.head_dim, half = dim / 2, t = blockIdx.y;
  const int head = blockIdx.x * kHeadWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (head >= h.heads + h.kv_heads) {
    let_next_start();
    return;
  }
  const bool query = head < h.heads;
  const int kv_rows = h.kv_heads * dim, kv_head = head - h.heads;
  const Bf16* const weight = query ? p.args.q_norm : p.args.k_norm;
  float* const x = query ? p.args.q + (static_cast<int64_t>(t) * h.heads + head) * dim
                         : p.args.kv + static_cast<int64_t>(t) * 2 * kv_rows + kv_head * dim;
  const float* const v = p.args.v_weight ? x + kv_rows : x;  // the raw k where there is no v projection
  const auto r = [&](float value) { return round_to(p.bfloat16, value); };
  float4 w[kPer][2];
#pragma unroll
  for (int j = 0; j < kPer; j++)
    for (int part = 0; part < 2; part++)
      w[j][part] = lane * 4 + j * 128 < half ? four(weight, part * half + lane * 4 + j * 128, dim) : float4{};
  wait_for_inputs();
  let_next_start();
  float4 a[kPer][2], b[kPer][2], cosine[kPer], sine[kPer];
  const int position = p.position[t], slot = p.slot[t];
  float sum = 0, v_sum = 0;
#pragma unroll
  for (int j = 0; j < kPer; j++) {
    const int i = lane * 4 + j * 128;
    cosine[j] = four(p.args.cosine + static_cast<int64_t>(t) * h.rotary_pairs, i, h.rotary_pairs);
    sine[j] = four(p.args.sine + static_cast<int64_t>(t) * h.rotary_pairs, i, h.rotary_pairs);
#pragma unroll
    for (int part = 0; part < 2; part++) {
      a[j][part] = i < half ? four(x, part * half + i, dim) : float4{};
      b[j][part] = !query && i < half ? four(v, part * half + i, dim) : float4{};
    }
  }
#pragma unroll
  for (int j = 0; j < kPer; j++)
#pragma unroll
    for (int part = 0; part < 2; part++) sum += squares(a[j][part]), v_sum += squares(b[j][part]);
  const float inverse = inverse_rms(warp_sum(sum), dim, p.eps);
  const float v_inverse = inverse_rms(warp_sum(v_sum), dim, p.eps);
  const int row = position < p.args.cache.capacity ? position : position % p.args.cache.capacity;
  const int64_t at =
      ((static_cast<int64_t>(slot) * h.kv_heads + kv_head) * p.args.cache.capacity + row) * dim;
  const auto to_cache = [&](void* cache, int i, float4 y) {
    if (p.bfloat16)
      *reinterpret_cast<uint2*>(static_cast<Bf16*>(cache) + at + i) =
          make_uint2(ptx::cvt_rn_bf16x2(y.x, y.y), ptx::cvt_rn_bf16x2(y.z, y.w));
    else
      *reinterpret_cast<float4*>(static_cast<float*>(cache) + at + i) = y;
  };
#pragma unroll
  for (int j = 0; j < kPer; j++) {
    const int i = lane * 4 + j * 128;
    if (i >= half) continue;
    float* const low = &a[j][0].x;
    float* const high = &a[j][1].x;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float y = r(low[e] * inverse * (&w[j][0].x)[e]), z = r(high[e] * inverse * (&w[j][1].x)[e]);
      if (i + e < h.rotary_pairs) {
        const float c = (&cosine[j].x)[e], s = (&sine[j].x)[e], y0 = y;
        y = r(fused(y0, c, -(z * s)));
        z = r(fused(z, c, y0 * s));
      }
      low[e] = y, high[e] = z;
    }
#pragma unroll
    for (int part = 0; part < 2; part++) {
      if (query) {
        *reinterpret_cast<float4*>(x + part * half + i) = a[j][part];
        continue;
      }
      to_cache(p.args.cache.k, part * half + i, a[j][part]);
      float4 y = b[j][part];
      y.x = r(y.x * v_inverse), y.y = r(y.y * v_inverse), y.z = r(y.z * v_inverse), y.w = r(y.w * v_inverse);
      to_cache(p.args.cache.v, part * half + i, y);
    }
  }
}

/// The same for any even head size, and any number of rotary pairs, one element after another.
__global__ void __launch_bounds__(kHeadWarps * 32)
    finish_odd_heads(const __grid_constant__ HeadParameters p) {
  wait_for_inputs();
  let_next_start();
  const Heads& h = p.args.heads;
  const int dim = h.head_dim, half = dim / 2, t = blockIdx.y, lane = threadIdx.x % 32;
  const int head = blockIdx.x * kHeadWarps + threadIdx.x / 32;
  if (head >= h.heads + h.kv_heads) return;
  const bool query = head < h.heads;
  const int kv_rows = h.kv_heads * dim, kv_head = head - h.heads;
  float* const x = query ? p.args.q + (static_cast<int64_t>(t) * h.heads + head) * dim
                         : p.args.kv + static_cast<int64_t>(t) * 2 * kv_rows + kv_head * dim;
  const float* const v = p.args.v_weight ? x + kv_rows : x;
  const Bf16* const weight = query ? p.args.q_norm : p.args.k_norm;
  const float* const cosine = p.args.cosine + static_cast<int64_t>(t) * h.rotary_pairs;
  const float* const sine = p.args.sine + static_cast<int64_t>(t) * h.rotary_pairs;
  const int64_t at = ((static_cast<int64_t>(p.slot[t]) * h.kv_heads + kv_head) * p.args.cache.capacity +
                      p.position[t] % p.args.cache.capacity) *
                     dim;
  const auto to_cache = [&](void* cache, int i, float value) {
    if (p.bfloat16)
      static_cast<Bf16*>(cache)[at + i] = to_bf16(value);
    else
      static_cast<float*>(cache)[at + i] = value;
  };
  float sum = 0, v_sum = 0;
#pragma unroll 1
  for (int i = lane; i < dim; i += 32) {
    sum = fused(x[i], x[i], sum);
    if (!query) v_sum = fused(v[i], v[i], v_sum);
  }
  const float inverse = inverse_rms(warp_sum(sum), dim, p.eps),
              v_inverse = inverse_rms(warp_sum(v_sum), dim, p.eps);
#pragma unroll 1
  for (int i = lane; i < half; i += 32) {
    if (!query) {
      to_cache(p.args.cache.v, i, round_to(p.bfloat16, v[i] * v_inverse));
      to_cache(p.args.cache.v, i + half, round_to(p.bfloat16, v[i + half] * v_inverse));
    }
    float a = round_to(p.bfloat16, x[i] * inverse * to_float(weight[i]));
    float b = round_to(p.bfloat16, x[i + half] * inverse * to_float(weight[i + half]));
    if (i < h.rotary_pairs) {
      const float a0 = a;
      a = round_to(p.bfloat16, fused(a0, cosine[i], -(b * sine[i])));
      b = round_to(p.bfloat16, fused(b, cosine[i], a0 * sine[i]));
    }
    if (query) {
      x[i] = a, x[i + half] = b;
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
  const int q_tiles = tiles_of(q_rows), kv_tiles = tiles_of(kv_rows);
  if (grouped::takes(a, d, in.tokens))
    grouped::project(a, d, in, cuda);
  else
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
  const bool even = a.heads.head_dim % 8 == 0 && a.heads.head_dim <= 512 && a.heads.rotary_pairs % 4 == 0;
  cuda.launch(
      even ? finish_heads : finish_odd_heads,
      dim3(static_cast<unsigned>((heads + kHeadWarps - 1) / kHeadWarps), static_cast<unsigned>(in.tokens)),
      kHeadWarps * 32, 0, HeadParameters{a, in.slot, in.position, d.eps, d.bfloat16});
}

}  // namespace tp::cuda
