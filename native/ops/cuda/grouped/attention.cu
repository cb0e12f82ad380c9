// Attention of many tokens. Neighbouring tokens of one sequence form a tile, cut where a position is a
// multiple of the tile: their query heads of one KV head are the rows of products with the cache, which is
// read in pieces cut at fixed positions, from the first to the last that the tile sees. What a row does not
// see adds exact zeros, so its bits do not depend on the rest of the tile.
#include "ops/cuda/grouped/grouped.cuh"
#include "ops/cuda/grouped/grouped.h"

namespace tp::cuda::grouped {

namespace {

constexpr int kTileThreads = 256, kMostLeaders = 8192;

/// Rows and positions of a tile for a head size: a warp keeps 16 rows of 256 output columns, so the heads of
/// 512 take two warps for a row, which both compute its scores.
template <int Dim>
struct Cut {
  static constexpr int kHalves = Dim / 256, kRows = 128 / kHalves, kPositions = 64 / kHalves;
  static constexpr int kRowBytes = Dim * 2, kPieceBytes = kPositions * kRowBytes;
  static constexpr int kQueries = kRows * kRowBytes;  // then two pieces of keys, two of values, the leaders
  static constexpr int kBytes = kQueries + 4 * kPieceBytes + kMostLeaders * 2;
};

struct TileParameters {
  AttentionArgs args;
  const int* slot;
  const int* position;
  int tokens, group, tile;  // tile: tokens, kRows / group
};

/// Lists the first token of every tile. All threads call it; returns how many there are.
__device__ int list_leaders(const TileParameters& p, uint16_t* leaders) {
  __shared__ int counts[kTileThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int done = 0;
#pragma unroll 1
  for (int t0 = 0; t0 < p.tokens; t0 += kTileThreads) {
    const int t = t0 + threadIdx.x;
    bool leads = false;
    if (t < p.tokens) {
      const int position = p.position[t];
      leads =
          t == 0 || position % p.tile == 0 || p.slot[t] != p.slot[t - 1] || position != p.position[t - 1] + 1;
    }
    const unsigned who = __ballot_sync(~0u, leads);
    if (lane == 0) counts[warp] = __popc(who);
    __syncthreads();
    int at = done + __popc(who & ((1u << lane) - 1));
#pragma unroll
    for (int w = 0; w < kTileThreads / 32; w++) {
      if (w < warp) at += counts[w];
      done += counts[w];
    }
    if (leads) leaders[at] = static_cast<uint16_t>(t);
    __syncthreads();
  }
  return done;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <int Dim>
__global__ void __launch_bounds__(kTileThreads, 1) attend_tiles(const __grid_constant__ TileParameters p) {
  using C = Cut<Dim>;
  constexpr int kPieces = Dim / 8;  // of 16 bytes in a row; piece i of row r lies where i ^ r % 8 would
  constexpr int kScores = C::kPositions / 8, kOut = 32;
  TP_DYNAMIC_SHARED(char, shared, 1024);
  wait_for_inputs();
  let_next_start();
  auto* const leaders = reinterpret_cast<uint16_t*>(shared + C::kQueries + 4 * C::kPieceBytes);
  const int count = list_leaders(p, leaders);
  const Heads& h = p.args.heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int half = warp % C::kHalves, first_row = warp / C::kHalves * 16;
  const uint32_t queries = shared_address(shared), keys = queries + C::kQueries,
                 values = keys + 2 * C::kPieceBytes;
  const int capacity = p.args.cache.capacity, items = count * h.kv_heads;
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int leader = count - 1 - item / h.kv_heads, kv_head = item % h.kv_heads;  // the longest first
    const int t0 = leaders[leader], tokens = (leader + 1 < count ? leaders[leader + 1] : p.tokens) - t0;
    const int position = p.position[t0], last = position + tokens - 1;
    const int first = h.window > 0 && position >= h.window ? position - h.window + 1 : 0;
    const int64_t cache = (static_cast<int64_t>(p.slot[t0]) * h.kv_heads + kv_head) * capacity * Dim;
    const auto bring = [&](uint32_t to, const void* from, int piece) {
      const Bf16* const rows = static_cast<const Bf16*>(from) + cache;
      const int start = piece * C::kPositions, at = start < capacity ? start : start % capacity;
#pragma unroll 4
      for (int i = threadIdx.x; i < C::kPositions * kPieces; i += kTileThreads) {
        const int row = i / kPieces, column = i % kPieces,
                  ring = at + row < capacity ? at + row : at + row - capacity;
        // What no row sees becomes zero.
        const int bytes = start + row >= first && start + row <= last ? 16 : 0;
        ptx::cp_async_16(to + row * C::kRowBytes + (column ^ row % 8) * 16,
                         rows + (bytes ? static_cast<int64_t>(ring) * Dim : 0) + column * 8, bytes);
      }
      ptx::cp_async_commit();
    };
    const int begin = first / C::kPositions, end = last / C::kPositions;
    __syncthreads();  // the last tile's pieces have been read
    bring(keys, p.args.cache.k, begin);
    bring(values, p.args.cache.v, begin);
    // Row r is head r % group of token r / group.
#pragma unroll 2
    for (int i = threadIdx.x; i < C::kRows * kPieces; i += kTileThreads) {
      const int row = i / kPieces, column = i % kPieces, token = row / p.group;
      float x[8] = {};
      if (token < tokens)
        eight(p.args.q +
                  (static_cast<int64_t>(t0 + token) * h.heads + kv_head * p.group + row % p.group) * Dim +
                  column * 8,
              x);
      *reinterpret_cast<uint4*>(shared + row * C::kRowBytes + (column ^ row % 8) * 16) = pack(x);
    }
    // The lane's two rows.
    int seen_from[2], seen_to[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = (first_row + lane / 4 + 8 * i) / p.group;
      seen_to[i] = position + (token < tokens ? token : 0);
      seen_from[i] = h.window > 0 ? seen_to[i] - h.window + 1 : 0;
    }
    float out[kOut][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
#pragma unroll 1
    for (int piece = begin; piece <= end; piece++) {
      const int turn = (piece - begin) % 2, next = (turn ^ 1) * C::kPieceBytes;
      if (piece < end) {
        bring(keys + next, p.args.cache.k, piece + 1);
        bring(values + next, p.args.cache.v, piece + 1);
        ptx::cp_async_wait<2>();
      } else {
        ptx::cp_async_wait<0>();
      }
      __syncthreads();
      float score[kScores][4] = {};
      {
        const int a = first_row + lane % 16, b = lane / 16 * 8 + lane % 8;
        const uint32_t a_row = queries + a * C::kRowBytes,
                       b_row = keys + turn * C::kPieceBytes + b * C::kRowBytes;
#pragma unroll 4
        for (int step = 0; step < Dim / 16; step++) {
          uint32_t x[4];
          ptx::ldmatrix_x4(x, a_row + ((2 * step + lane / 16) ^ lane % 8) * 16);
#pragma unroll
          for (int n = 0; n < kScores / 2; n++) {
            uint32_t y[4];
            ptx::ldmatrix_x4(y, b_row + n * 16 * C::kRowBytes + ((2 * step + lane / 8 % 2) ^ lane % 8) * 16);
            multiply(score[2 * n], x[0], x[1], x[2], x[3], y[0], y[1]);
            multiply(score[2 * n + 1], x[0], x[1], x[2], x[3], y[2], y[3]);
          }
        }
      }
      // Softmax so far; a lane has columns 2 (lane % 4) and the next of every eight.
      float scale[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < kScores; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const int at = piece * C::kPositions + n * 8 + lane % 4 * 2 + j;
            float& s = score[n][2 * i + j];
            if (at < seen_from[i] || at > seen_to[i]) s = -INFINITY;
            most = fmaxf(most, s);
          }
        most = fmaxf(maximum[i], quad_max(most));
        const float base = most == -INFINITY ? 0 : most;
        constexpr float kLog2e = 1.44269504f;
        scale[i] = ptx::ex2_approx((maximum[i] - base) * kLog2e);
        maximum[i] = most;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kScores; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float& s = score[n][2 * i + j];
            s = ptx::ex2_approx((s - base) * kLog2e);
            sum += s;
          }
        total[i] = fused(total[i], scale[i], sum);
      }
#pragma unroll
      for (int n = 0; n < kOut; n++) {
        out[n][0] *= scale[0], out[n][1] *= scale[0];
        out[n][2] *= scale[1], out[n][3] *= scale[1];
      }
      const uint32_t v_row = values + turn * C::kPieceBytes + (lane / 8 % 2 * 8 + lane % 8) * C::kRowBytes;
#pragma unroll
      for (int step = 0; step < kScores / 2; step++) {
        const uint32_t x[4] = {ptx::cvt_rn_bf16x2(score[2 * step][0], score[2 * step][1]),
                               ptx::cvt_rn_bf16x2(score[2 * step][2], score[2 * step][3]),
                               ptx::cvt_rn_bf16x2(score[2 * step + 1][0], score[2 * step + 1][1]),
                               ptx::cvt_rn_bf16x2(score[2 * step + 1][2], score[2 * step + 1][3])};
#pragma unroll
        for (int n = 0; n < kOut / 2; n++) {
          uint32_t y[4];
          ptx::ldmatrix_x4_trans(
              y, v_row + step * 16 * C::kRowBytes + ((half * 32 + 2 * n + lane / 16) ^ lane % 8) * 16);
          multiply(out[2 * n], x[0], x[1], x[2], x[3], y[0], y[1]);
          multiply(out[2 * n + 1], x[0], x[1], x[2], x[3], y[2], y[3]);
        }
      }
      __syncthreads();  // before the pieces after the next come
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float inverse = __frcp_rn(quad_sum(total[i]));
      const int row = first_row + lane / 4 + 8 * i, token = row / p.group;
      if (token >= tokens) continue;
      float* const to =
          p.args.attention +
          (static_cast<int64_t>(t0 + token) * h.heads + kv_head * p.group + row % p.group) * Dim +
          half * 256 + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kOut; n++)
        *reinterpret_cast<float2*>(to + n * 8) =
            make_float2(round_to(true, out[n][2 * i] * inverse), round_to(true, out[n][2 * i + 1] * inverse));
    }
  }
}

template <int Dim>
void attend_as(TileParameters p, CudaBackend& backend) {
  p.tile = Cut<Dim>::kRows / p.group;
  backend.launch(attend_tiles<Dim>, dim3(static_cast<unsigned>(backend.processors())), kTileThreads,
                 Cut<Dim>::kBytes, p);
}

}  // namespace

bool takes(const AttentionArgs& a, const Dims& d, int tokens) {
  const int group = a.heads.heads / a.heads.kv_heads;
  return chosen(d, tokens) && tokens > kFew && tokens <= kMostLeaders &&
         (a.heads.head_dim == 256 || a.heads.head_dim == 512) && group <= 16 && (group & (group - 1)) == 0;
}

void attention(const AttentionArgs& a, const Dims&, const Input& in, CudaBackend& backend) {
  const TileParameters p{a, in.slot, in.position, in.tokens, a.heads.heads / a.heads.kv_heads, 0};
  if (a.heads.head_dim == 256)
    attend_as<256>(p, backend);
  else
    attend_as<512>(p, backend);
}

}  // namespace tp::cuda::grouped
