// A token's row of the residual stream, spread over the block's threads, and sums over the block. The order
// of a sum depends on the row's length alone.
#pragma once

#include "ops/cuda/resident/sync.cuh"

namespace tp::cuda::resident {

/// Sums over the computing threads of up to 8 values each, given to all: give() every value,
/// sync_consumers(), then take().
class Sums {
 public:
  /// `room`: 2 turns of kMostTokens * kWarps floats.
  __device__ explicit Sums(float* room) : room_(room) {}
  __device__ void next() { turn_ ^= kMostTokens * kWarps; }
  __device__ void give(int i, float value) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) room_[turn_ + i * kWarps + threadIdx.x / 32] = value;
  }
  __device__ float take(int i) const {
    const float4 a = reinterpret_cast<const float4*>(room_ + turn_ + i * kWarps)[0],
                 b = reinterpret_cast<const float4*>(room_ + turn_ + i * kWarps)[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  }
  __device__ float over_block(float value) {
    next();
    give(0, value);
    sync_consumers();
    return take(0);
  }

 private:
  float* room_;
  int turn_ = 0;
};
static_assert(kWarps == 8);

/// Where an element of an activation lies in its row: the 2nd and 3rd pairs of every 8 change places, so that
/// the pairs which products take together are neighbours.
template <class Index>
__device__ __forceinline__ Index operand_at(Index i) {
  return (i & ~Index{6}) | (i & 2) << 1 | (i & 4) >> 1;
}

/// Where a thread's piece p of four neighbours begins.
__device__ inline int piece_at(int p) { return (p * kThreads + static_cast<int>(threadIdx.x)) * 4; }

/// A row of weights as stored, asked for before the inputs are there.
struct NormWeights {
  uint2 raw[kRowPieces];
  __device__ void load(const Bf16* from, int n) {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++) {
      raw[p] = make_uint2(0, 0);
      if (piece_at(p) < n) raw[p] = ptx::ld_global_nc_v2(from + piece_at(p));
    }
  }
  __device__ float at(int p, int j) const {
    const uint32_t pair = j < 2 ? raw[p].x : raw[p].y;
    return float_of(j % 2 ? pair & 0xffff0000u : pair << 16);
  }
};

struct Row {
  float x[kRowPieces][4];

  __device__ void unpack(int p, uint2 raw) {
    x[p][0] = float_of(raw.x << 16), x[p][1] = float_of(raw.x & 0xffff0000u);
    x[p][2] = float_of(raw.y << 16), x[p][3] = float_of(raw.y & 0xffff0000u);
  }

  /// What other blocks may have written in this launch: never from the first-level cache.
  __device__ void load(const float* from, int n) {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++) {
      float4 four = make_float4(0, 0, 0, 0);
      if (piece_at(p) < n) four = __ldcg(reinterpret_cast<const float4*>(from + piece_at(p)));
      x[p][0] = four.x, x[p][1] = four.y, x[p][2] = four.z, x[p][3] = four.w;
    }
  }
  __device__ void store(float* to, int n) const {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++)
      if (piece_at(p) < n)
        *reinterpret_cast<float4*>(to + piece_at(p)) = make_float4(x[p][0], x[p][1], x[p][2], x[p][3]);
  }
  /// x = f(x, piece, place in it)
  template <class Change>
  __device__ void change(Change&& f) {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++)
#pragma unroll
      for (int j = 0; j < 4; j++) x[p][j] = f(x[p][j], p, j);
  }
  __device__ float squares() const {
    float sum = 0;
#pragma unroll
    for (int p = 0; p < kRowPieces; p++)
#pragma unroll
      for (int j = 0; j < 4; j++) sum = fused(x[p][j], x[p][j], sum);
    return sum;
  }
  /// As an activation, a pair at a time: from shared memory, and into memory of either kind.
  __device__ void get(const char* from, int n) {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++) {
      uint2 raw = make_uint2(0, 0);
      if (piece_at(p) < n) {
        const auto* const pairs = reinterpret_cast<const uint32_t*>(from + 2 * operand_at(piece_at(p)));
        raw = make_uint2(pairs[0], pairs[2]);
      }
      unpack(p, raw);
    }
  }
  __device__ void put(void* to, int n) const {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++)
      if (piece_at(p) < n) {
        auto* const pairs = static_cast<uint32_t*>(to) + operand_at(piece_at(p)) / 2;
        pairs[0] = to_bf16(x[p][0]) | static_cast<uint32_t>(to_bf16(x[p][1])) << 16;
        pairs[2] = to_bf16(x[p][2]) | static_cast<uint32_t>(to_bf16(x[p][3])) << 16;
      }
  }
  /// One that another block has left in this launch.
  __device__ void fetch(const Bf16* from, int n) {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++) {
      uint2 raw = make_uint2(0, 0);
      if (piece_at(p) < n) {
        const auto* const pairs = reinterpret_cast<const uint32_t*>(from + operand_at(piece_at(p)));
        raw = make_uint2(__ldcg(pairs), __ldcg(pairs + 2));
      }
      unpack(p, raw);
    }
  }
};

/// Every activation is rounded where the reference rounds; resident steps are bfloat16 steps.
__device__ inline float rounded(float x) { return to_float(to_bf16(x)); }

/// The sum over N ranks, from `first` on, of elements `at` .. of operation `epoch`, in tree order.
template <int N>
__device__ __forceinline__ Row gather(const PeerMemory& w, uint32_t epoch, int64_t at, int n, int first = 0) {
  if constexpr (N > 2) {
    Row low = gather<N / 2>(w, epoch, at, n, first);
    const Row high = gather<N / 2>(w, epoch, at, n, first + N / 2);
    low.change([&](float x, int p, int j) { return x + high.x[p][j]; });
    return low;
  } else {
    Row rows[N];
    Timeout timeout;
    for (;;) {
      bool there = true;
#pragma unroll
      for (int s = 0; s < N; s++) {
        const uint64_t* const from = w.inbox[w.rank] + ((epoch & 1) * w.size + first + s) * w.floats + at;
#pragma unroll
        for (int p = 0; p < kRowPieces; p++) {
          if (piece_at(p) >= n) {
            for (float& x : rows[s].x[p]) x = 0;
            continue;
          }
          uint64_t v[4];
          ptx::ld_relaxed_sys_v2(v[0], v[1], from + piece_at(p));
          ptx::ld_relaxed_sys_v2(v[2], v[3], from + piece_at(p) + 2);
#pragma unroll
          for (int j = 0; j < 4; j++) {
            there &= static_cast<uint32_t>(v[j] >> 32) == epoch;
            rows[s].x[p][j] = float_of(static_cast<uint32_t>(v[j]));
          }
        }
      }
      if (there) break;
      timeout.poll(w, kPeerTimeoutNs, first == w.rank ? first + N - 1 : first);
    }
    if constexpr (N == 2) rows[0].change([&](float x, int p, int j) { return x + rows[1].x[p][j]; });
    return rows[0];
  }
}

/// Elements at .. of the all-reduce `epoch`, as soon as all ranks have sent them.
__device__ __noinline__ inline Row reduced(const PeerMemory& w, uint32_t epoch, int64_t at, int n) {
  if (w.size == 1) return gather<1>(w, epoch, at, n);
  if (w.size == 2) return gather<2>(w, epoch, at, n);
  if (w.size == 4) return gather<4>(w, epoch, at, n);
  return gather<8>(w, epoch, at, n);
}

}  // namespace tp::cuda::resident
