// A chunk of attention, tile by tile: values summed up by the weights exp(score - maximum), for all query
// heads of a KV head. Two heads are less work for the threads, eight for the tensor cores.
#pragma once

#include "ops/cuda/resident/tasks.cuh"

namespace TP_RESIDENT {

/// A tile as the warps share it out: of its scores each takes 8 rows and kPart dimensions.
template <int D>
struct TileShape {
  static constexpr int kRows = tile_of(D), kHeads = most_group(D), kPart = 128;
  static constexpr int kParts = D / kPart, kGroups = kWarps / kParts;  // of dimensions; of rows
  static_assert(kGroups * 8 == kRows);
  using Scores = float[kParts][kHeads][kRows + 8];  // parts of a score, on other banks for other heads
};

__device__ inline float4 scaled(float4 x, float by) {
  return make_float4(x.x * by, x.y * by, x.z * by, x.w * by);
}
__device__ inline float4 fused_four(float a, float4 x, float4 sum) {
  return make_float4(fused(a, x.x, sum.x), fused(a, x.y, sum.y), fused(a, x.z, sum.z), fused(a, x.w, sum.w));
}
__device__ inline float4 plus(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/// Sums in fp32: a warp has 8 rows and 128 dimensions, a lane four of these of all heads. A lane of the
/// softmax has one head, of a row of each kApart. Every warp looks at all rows for the maximum, the warp's
/// own first.
template <int D>
class FewHeads {
  using Shape = TileShape<D>;
  static constexpr int kRows = Shape::kRows, kHeads = Shape::kHeads, kGroups = Shape::kGroups;
  static constexpr int kApart = 32 / kHeads, kLooks = kRows / kApart;

 public:
  struct Room {
    float weight[kWarps][8 + 1][kHeads];     // of a warp's rows, then what the tiles before count for
    float4 sum[kGroups - 1][kHeads][D / 4];  // of the groups but the first, behind the last tile
    float total[kGroups][kHeads];            // of weights
  };
  __device__ FewHeads(Room& room, int warp, int lane)
      : room_(room),
        warp_(warp),
        lane_(lane),
        head_(lane % kHeads),
        look_(lane / kHeads),
        of_group_(warp / Shape::kParts),
        left_(warp % Shape::kParts * Shape::kPart) {}

  __device__ __forceinline__ void begin() {
    max_ = -INFINITY, total_ = 0;
#pragma unroll
    for (float4& x : acc_) x = make_float4(0, 0, 0, 0);
  }
  /// A tile, of which the token sees the rows in `seen`.
  __device__ __forceinline__ void add(const typename Shape::Scores& parts, const char* values,
                                      uint32_t seen) {
    const int top = of_group_ * 8;
    float score[kLooks], most = max_;
#pragma unroll
    for (int k = 0; k < kLooks; k++) {
      const int row = (top + look_ + k * kApart) % kRows;
      score[k] = parts[0][head_][row];
#pragma unroll
      for (int p = 1; p < Shape::kParts; p++) score[k] += parts[p][head_][row];
      if (!(seen >> row & 1)) score[k] = -INFINITY;
      most = score[k] > most ? score[k] : most;
    }
#pragma unroll
    for (int span = kHeads; span < 32; span *= 2) {
      const float other = __shfl_xor_sync(~0u, most, span);
      most = other > most ? other : most;
    }
    auto& weight = room_.weight[warp_];
    const float keep = exp_f32(max_ - most);
    max_ = most, total_ *= keep;
    weight[8][head_] = keep;  // lanes of a head have the same
#pragma unroll
    for (int k = 0; k < kLooks && k * kApart < 8; k++)
      if (look_ + k * kApart < 8) total_ += weight[look_ + k * kApart][head_] = exp_f32(score[k] - max_);
    __syncwarp();

    const char* const value = values + (top * D + left_ + lane_ * 4) * 2;
#pragma unroll
    for (int k = 0; k < kHeads; k++) acc_[k] = scaled(acc_[k], weight[8][k]);
#pragma unroll 4
    for (int r = 0; r < 8; r++) {
      uint2 raw = *reinterpret_cast<const uint2*>(value + r * 2 * D);
      if (!(seen >> (top + r) & 1)) raw = make_uint2(0, 0);  // what lies there may be no number
      const float4 v = make_float4(float_of(raw.x << 16), float_of(raw.x & 0xffff0000u),
                                   float_of(raw.y << 16), float_of(raw.y & 0xffff0000u));
#pragma unroll
      for (int k = 0; k < kHeads; k += 2) {
        const float2 w = *reinterpret_cast<const float2*>(&weight[r][k]);
        acc_[k] = fused_four(w.x, v, acc_[k]), acc_[k + 1] = fused_four(w.y, v, acc_[k + 1]);
      }
    }
  }
  /// The groups' sums, in their order: to partial (group, chunks, D) and scale (group, chunks), `chunks`
  /// apart.
  __device__ __forceinline__ void leave(float* partial, float2* scale, int chunks, int group) {
#pragma unroll
    for (int span = kHeads; span < 32; span *= 2) total_ += __shfl_xor_sync(~0u, total_, span);
    if (left_ == 0 && lane_ < kHeads) room_.total[of_group_][lane_] = total_;
    const int four = left_ / 4 + lane_;
    if (of_group_ > 0)
#pragma unroll
      for (int k = 0; k < kHeads; k++) room_.sum[of_group_ - 1][k][four] = acc_[k];
    sync_consumers();
    if (of_group_ == 0)
#pragma unroll
      for (int k = 0; k < kHeads; k++) {
        if (k >= group) continue;
#pragma unroll
        for (int g = 1; g < kGroups; g++) acc_[k] = plus(acc_[k], room_.sum[g - 1][k][four]);
        reinterpret_cast<float4*>(partial + k * chunks * D)[four] = acc_[k];
      }
    if (warp_ > 0 || lane_ >= group) return;
#pragma unroll
    for (int g = 1; g < kGroups; g++) total_ += room_.total[g][lane_];
    scale[lane_ * chunks] = make_float2(max_, total_);
  }

 private:
  Room& room_;
  const int warp_, lane_, head_, look_, of_group_, left_;
  float max_ = 0, total_ = 0;
  float4 acc_[kHeads];
};

/// Sums by tensor-core products: a warp has all rows and kOwn dimensions. A lane has a head's weights of four
/// rows of 16, and of the values of these rows kProducts dimensions. Weights come in two parts, rounded to
/// bfloat16 and what that leaves, as a product's rows 0 to 7 and 8 to 15, so that sums are as good as in
/// fp32.
template <int D>
class ManyHeads {
  using Shape = TileShape<D>;
  static constexpr int kOwn = D / kWarps, kProducts = kOwn / 8;
  static_assert(Shape::kRows == 16 && Shape::kHeads == 8 && kProducts == 8);

 public:
  struct Room {};
  __device__ ManyHeads(Room&, int warp, int lane)
      : head_(lane / 4), quarter_(lane % 4), warp_(warp), first_(warp * kOwn + head_ * kProducts) {}

  __device__ __forceinline__ void begin() {
    max_ = -INFINITY, total_ = 0;
#pragma unroll
    for (auto& x : acc_) x[0] = x[1] = x[2] = x[3] = 0;
  }
  __device__ __forceinline__ void add(const typename Shape::Scores& parts, const char* values,
                                      uint32_t seen) {
    uint4 value[4];
    float weight[4], most = max_;
#pragma unroll
    for (int i = 0; i < 4; i++)
      value[i] = *reinterpret_cast<const uint4*>(values + (row(i) * D + first_) * 2);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float2 sum = *reinterpret_cast<const float2*>(&parts[0][head_][row(i)]);
#pragma unroll
      for (int p = 1; p < Shape::kParts; p++) {
        const float2 x = *reinterpret_cast<const float2*>(&parts[p][head_][row(i)]);
        sum = make_float2(sum.x + x.x, sum.y + x.y);
      }
      weight[i] = sum.x, weight[i + 1] = sum.y;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (!(seen >> row(i) & 1))
        weight[i] = -INFINITY, value[i] = make_uint4(0, 0, 0, 0);  // what lies there may be no number
      most = weight[i] > most ? weight[i] : most;
    }
#pragma unroll
    for (int span = 1; span < 4; span *= 2) {
      const float other = __shfl_xor_sync(~0u, most, span);
      most = other > most ? other : most;
    }
    const float keep = exp_f32(max_ - most);
    max_ = most, total_ *= keep;
#pragma unroll
    for (auto& x : acc_)
#pragma unroll
      for (float& sum : x) sum *= keep;
#pragma unroll
    for (float& x : weight) total_ += x = exp_f32(x - max_);
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      a[i] = ptx::cvt_rn_bf16x2(weight[i], weight[i + 1]);
      a[i + 1] =
          ptx::cvt_rn_bf16x2(weight[i] - float_of(a[i] << 16), weight[i + 1] - float_of(a[i] & 0xffff0000u));
    }
    const auto multiply_two = [&](int j, uint32_t one, uint32_t two, uint32_t three, uint32_t four) {
      const auto low = [](uint32_t x, uint32_t y) { return (x & 0xffffu) | y << 16; };
      const auto high = [](uint32_t x, uint32_t y) { return x >> 16 | (y & 0xffff0000u); };
      ptx::mma_m16n8k16(acc_[j], a[0], a[1], a[2], a[3], low(one, two), low(three, four));
      ptx::mma_m16n8k16(acc_[j + 1], a[0], a[1], a[2], a[3], high(one, two), high(three, four));
    };
    multiply_two(0, value[0].x, value[1].x, value[2].x, value[3].x);
    multiply_two(2, value[0].y, value[1].y, value[2].y, value[3].y);
    multiply_two(4, value[0].z, value[1].z, value[2].z, value[3].z);
    multiply_two(6, value[0].w, value[1].w, value[2].w, value[3].w);
  }
  __device__ __forceinline__ void leave(float* partial, float2* scale, int chunks, int group) {
#pragma unroll
    for (int span = 1; span < 4; span *= 2) total_ += __shfl_xor_sync(~0u, total_, span);
    if (head_ >= group) return;
    // A lane's sums are of two columns, which are neighbours too.
    float* const to = partial + head_ * chunks * D + warp_ * kOwn + 2 * quarter_ * kProducts;
    const auto sum = [&](int j, int column) { return acc_[j][column] + acc_[j][2 + column]; };
#pragma unroll
    for (int column = 0; column < 2; column++)
#pragma unroll
      for (int j = 0; j < kProducts; j += 4)
        *reinterpret_cast<float4*>(to + column * kProducts + j) =
            make_float4(sum(j, column), sum(j + 1, column), sum(j + 2, column), sum(j + 3, column));
    if (warp_ == 0 && quarter_ == 0) scale[head_ * chunks] = make_float2(max_, total_);
  }

 private:
  /// Neighbours, and the same of the rows from 8 on.
  __device__ int row(int i) const { return i / 2 * 8 + 2 * quarter_ + i % 2; }
  const int head_, quarter_, warp_, first_;
  float max_ = 0, total_ = 0;
  float acc_[kProducts][4];
};

}  // namespace TP_RESIDENT
