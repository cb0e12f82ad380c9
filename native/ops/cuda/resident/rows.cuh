// A token's row of the residual stream, spread over the block's threads, and sums over the block. The order
// of a sum depends on the row's length alone.
#pragma once

#include "ops/cuda/resident/sync.cuh"

namespace TP_RESIDENT {

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

/// Four neighbours of a row of activations, from `at` on.
__device__ __forceinline__ void put_four(void* row, int64_t at, float4 x) {
  auto* const pairs = static_cast<uint32_t*>(row) + operand_at(at) / 2;
  pairs[0] = ptx::cvt_rn_bf16x2(x.x, x.y), pairs[2] = ptx::cvt_rn_bf16x2(x.z, x.w);
}

/// Every activation is rounded where the reference rounds; resident steps are bfloat16 steps. As the high
/// half of a pair it is the float at once.
__device__ inline float rounded(float x) { return float_of(ptx::cvt_rn_bf16x2(0, x)); }

/// 1 / sqrt(mean + eps) of N elements, to a few units in the last place: it is rounded to bfloat16 soon.
template <int N>
__device__ __forceinline__ float inverse_rms_of(float squares, float eps) {
  return ptx::rsqrt_approx(fused(squares, 1.0f / N, eps));
}

constexpr int kRowLength = 8 * kWholePieces * kWarps;  // the hidden size
static_assert(kRowPieces == 3 && kRowLength <= kRowPieces * kThreads * 4);

/// Where a thread's piece p of four neighbours begins.
__device__ inline int piece_at(int p) { return (p * kThreads + static_cast<int>(threadIdx.x)) * 4; }

/// Whether the thread has a piece p of a row of n: only of the last piece a question when it runs.
__device__ inline bool has_piece(int p, int n = kRowLength) {
  return (p + 1) * kThreads * 4 <= kRowLength || piece_at(p) < n;
}

/// A row of weights as stored. It is asked for before the inputs are there, and comes to shared memory: in
/// registers it would be in the way of what waits.
struct NormWeights {
  uint2 raw[kRowPieces];
  /// There behind ptx::cp_async_wait_all(): each thread brings what it will need.
  static __device__ __forceinline__ void ask(char* room, const Bf16* from) {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++)
      if (has_piece(p)) ptx::cp_async_8(ptx::shared_address(room) + piece_at(p) * 2, from + piece_at(p));
  }
  __device__ __forceinline__ void get(const char* room) {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++) {
      raw[p] = make_uint2(0, 0);
      if (has_piece(p)) raw[p] = *reinterpret_cast<const uint2*>(room + piece_at(p) * 2);
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
      if (has_piece(p, n)) four = __ldcg(reinterpret_cast<const float4*>(from + piece_at(p)));
      x[p][0] = four.x, x[p][1] = four.y, x[p][2] = four.z, x[p][3] = four.w;
    }
  }
  __device__ void store(float* to, int n) const {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++)
      if (has_piece(p, n))
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
    float sum[kRowPieces] = {};
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int p = 0; p < kRowPieces; p++) sum[p] = fused(x[p][j], x[p][j], sum[p]);
    return (sum[0] + sum[1]) + sum[2];
  }
  /// As an activation, a pair at a time: from shared memory, and into memory of either kind.
  __device__ void get(const char* from, int n) {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++) {
      uint2 raw = make_uint2(0, 0);
      if (has_piece(p, n)) {
        const auto* const pairs = reinterpret_cast<const uint32_t*>(from + 2 * operand_at(piece_at(p)));
        raw = make_uint2(pairs[0], pairs[2]);
      }
      unpack(p, raw);
    }
  }
  __device__ void put(void* to, int n) const {
#pragma unroll
    for (int p = 0; p < kRowPieces; p++)
      if (has_piece(p, n)) put_four(to, piece_at(p), make_float4(x[p][0], x[p][1], x[p][2], x[p][3]));
  }
};

/// sums[r] = row r, from element `at` on, of the operation whose turn it is: all ranks' values in tree order,
/// as soon as they are there. Everything is asked for at once, but again only rows of ranks that were not
/// there: all of them would take longer than the access that brings the last line.
template <int Ranks, int Rows>
__device__ __forceinline__ void gather(Row (&sums)[Rows], const PeerMemory& w, int turn, int64_t at) {
  const float* const from =
      w.inbox[w.rank] + static_cast<int64_t>(turn * Ranks) * w.floats + at + piece_at(0);
  const auto step = [](int p) { return has_piece(p) ? p * kThreads * 4 : 0; };  // a piece too many: the first
  uint64_t v[Rows][Ranks][kRowPieces][2] = {};
  uint32_t missing = (1u << Rows * Ranks) - 1;
  const auto each = [&](auto&& visit) {
#pragma unroll
    for (int i = 0; i < Rows * Ranks; i++)
      if (missing >> i & 1) visit(i / Ranks, i % Ranks, 1u << i);
  };
  for (Timeout timeout; __any_sync(~0u, missing != 0);
       timeout.poll(w, kPeerTimeoutNs, (__ffs(static_cast<int>(missing)) - 1) % Ranks)) {
    each([&](int r, int rank, uint32_t) {
#pragma unroll
      for (int p = 0; p < kRowPieces; p++) {
        uint64_t (&line)[2] = v[r][rank][p];
        ptx::ld_relaxed_sys_b128(line[0], line[1], from + rank * w.floats + r * kRowLength + step(p));
      }
    });
    each([&](int r, int rank, uint32_t bit) {
      bool there = true;
#pragma unroll
      for (const uint64_t (&line)[2] : v[r][rank]) there &= static_cast<uint32_t>(line[0]) != kNothing;
      if (there) missing &= ~bit;
    });
  }
#pragma unroll
  for (int r = 0; r < Rows; r++)
    sums[r].change([&](float, int p, int j) {
      float sum[Ranks];
#pragma unroll
      for (int rank = 0; rank < Ranks; rank++)
        sum[rank] = float_of(static_cast<uint32_t>(v[r][rank][p][j / 2] >> (j % 2 * 32)));
#pragma unroll
      for (int span = 1; span < Ranks; span *= 2)
#pragma unroll
        for (int rank = 0; rank < Ranks; rank += 2 * span) sum[rank] += sum[rank + span];
      return has_piece(p) ? sum[0] : 0;
    });
}

/// Out of line, where registers would not do for more.
template <int Ranks>
__device__ __noinline__ Row gather_row(const PeerMemory& w, int turn, int64_t at) {
  Row sum[1];
  gather<Ranks>(sum, w, turn, at);
  return sum[0];
}

template <int Rows>
__device__ __forceinline__ void reduced(Row (&sums)[Rows], const PeerMemory& w, int turn, int64_t at) {
  switch (w.size) {
    case 1:
      return gather<1>(sums, w, turn, at);
    case 2:
      return gather<2>(sums, w, turn, at);
    default:
#pragma unroll
      for (int r = 0; r < Rows; r++)
        sums[r] = w.size == 4 ? gather_row<4>(w, turn, at + r * kRowLength)
                              : gather_row<8>(w, turn, at + r * kRowLength);
  }
}

}  // namespace TP_RESIDENT
