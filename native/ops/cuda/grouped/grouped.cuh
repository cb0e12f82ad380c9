// Weight rows times many columns of activations, every weight read once for all of them.
//
// A block takes tiles of weight rows by columns (tokens, or the assignments of one expert) by turns. One warp
// brings weights by the copy engine, a few more bring the columns' activations (tokens by the copy engine, an
// expert's by 16-byte copies), both into the same ring of stages, as far ahead as there is room; the other
// warps multiply: tensor-core products of bfloat16 with fp32 sums. A sum goes along its leaf (or the whole
// row) in steps of 16 elements, the last of a piece of 88 has 8, so its bits depend on nothing but its own
// weights and activations: not on the tile, the other columns, the number of tokens or the TP degree. Leaves
// meet in tree order, or are written apart.
#pragma once

#include "ops/cuda/grouped/bring.cuh"

namespace tp::cuda::grouped {

/// Adds a level of the stack to the sums, or moves the sums there. A thread has places of its own.
template <class S, int M, int N>
__device__ inline void join_level(float (&acc)[M][N][4], float* stack, int level, bool keep) {
  float* const place = stack + level * S::kTeams * S::kRows * S::kColumns + threadIdx.x;
#pragma unroll
  for (int i = 0; i < M * N * 4; i++) {
    float& sum = acc[i / (N * 4)][i / 4 % N][i % 4];
    float& kept = place[i * S::kWarps * 32];
    if (keep)
      kept = sum, sum = 0;
    else
      sum = kept + sum;
  }
}

/// Adds the teams' sums to the first team's, in tree order. All multiplying warps call it.
template <class S, int M, int N>
__device__ inline void join_teams(float (&acc)[M][N][4], float* room, int team) {
  constexpr int kThreads = S::kTeamWarps * 32;
  static_assert(S::kTeams == 4 || S::kTeams == 2);
  float* const place = room + threadIdx.x % kThreads;
  const auto at = [&](int of, int i) -> float& { return place[((of - 1) * M * N * 4 + i) * kThreads]; };
#pragma unroll
  for (int i = 0; i < M * N * 4; i++)
    if (team > 0) at(team, i) = acc[i / (N * 4)][i / 4 % N][i % 4];
  ptx::bar_sync<2, S::kWarps * 32>();
#pragma unroll
  for (int i = 0; i < M * N * 4; i++) {
    float& sum = acc[i / (N * 4)][i / 4 % N][i % 4];
    if (team == 0) sum = S::kTeams == 2 ? sum + at(1, i) : (sum + at(1, i)) + (at(2, i) + at(3, i));
  }
  ptx::bar_sync<2, S::kWarps * 32>();  // before the next tile's come
}

/// Multiplies: a warp's part of every tile.
template <class S, int Chunk, Finish F>
__device__ void multiply_tiles(const Parameters& p, const Units<S>& units, char* stages, float* stack,
                               const Slot<S>* slots, uint32_t barriers, int levels) {
  using R = Room<S, Chunk>;
  constexpr int kM = S::kRowTiles, kN = S::kColumnTiles, kSteps = (Chunk + 15) / 16;
  constexpr bool kGated = F == Finish::gated, kDealt = kIsDealt<S, F>;
  static_assert(kN % 2 == 0 && kSteps % 2 == 0);
  const int team = threadIdx.x / 32 / S::kTeamWarps, warp = threadIdx.x / 32 % S::kTeamWarps,
            lane = threadIdx.x % 32, total = units.total();
  const int row_warp = warp % S::kRowWarps, first_column = warp / S::kRowWarps * kN * 8;
  // What the lane asks ldmatrix for: its row and piece of the four 8 x 8 matrices.
  uint32_t a_row[kM];
#pragma unroll
  for (int m = 0; m < kM; m++) {
    const int tile = row_warp * kM + m, high = lane / 8 % 2;
    const int row = kDealt   ? (2 * m + high) * (S::kRows / 4) + row_warp * 8 + lane % 8
                    : kGated ? high * (S::kRows / 2) + tile * 8 + lane % 8
                             : tile * 16 + high * 8 + lane % 8;
    a_row[m] = shared_address(stages) + row * R::kPitch;
  }
  const uint32_t b_row = shared_address(stages) + (first_column + lane / 16 * 8 + lane % 8) * R::kPitch;
  const int a_piece = lane / 16, b_piece = lane / 8 % 2;
  const auto at = [&](int piece) { return (Chunk == 64 ? piece ^ lane % 8 : piece) * 16; };
  // A step's elements of weights and activations; the next step's come while this one's are multiplied.
  struct Step {
    uint32_t a[kM][4], b[kN / 2][4];
  };
  // Without Full only the pairs of column tiles that hold columns are multiplied, of one pair its first tile.
  constexpr bool kOnePair = kN == 2;
  const auto load = [&]<bool Full>(Step& to, uint32_t stage, int chunk, int step, int pairs) {
    const bool half = step * 16 + 8 == Chunk;
#pragma unroll
    for (int m = 0; m < kM; m++)
      ptx::ldmatrix_x4(to.a[m],
                       a_row[m] + stage + R::weights_at(chunk) + at(2 * step + (half ? 0 : a_piece)));
#pragma unroll
    for (int pair = 0; pair < kN / 2; pair++) {
      const uint32_t from =
          b_row + stage + R::tokens_at(chunk) + pair * 16 * R::kPitch + at(2 * step + (half ? 0 : b_piece));
      if (!Full && kOnePair)
        ptx::ldmatrix_x2(to.b[0][0], to.b[0][1], from);
      else if (Full || pair < pairs)
        ptx::ldmatrix_x4(to.b[pair], from);
    }
  };
  Walk walk;
  int slot = 0;
#pragma unroll 1
  for (int u = blockIdx.x; u < total; u += gridDim.x) {
    uint32_t full = barriers + walk.at * 16;
    wait_for(full, walk.phase);
    const Slot<S>& x = slots[slot];
    if (++slot > p.stages) slot = 0;
    const Part& part = p.part[x.part];
    const bool apart = part.leaf_stride != 0, sided = S::kTeams > 1 && part.teams > 1;
    const int tiles = (x.count - first_column + 7) / 8, pairs = (tiles + 1) / 2;  // that hold columns
    const int chunks = part.chunks, all_chunks = part.leaves * chunks,
              leaves = sided ? part.leaves / S::kTeams : part.leaves;
    const bool takes_part = tiles > 0 && (sided ? team < all_chunks : team == 0);
    float acc[kM][kN][4] = {};
    const auto write = [&](int leaf) {
    // A lane's sums: (row lane / 4, column 2 (lane % 4)), the next column, and the same of row + 8.
#pragma unroll
      for (int n = 0; n < kN; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int out_row = x.out_row[first_column + n * 8 + lane % 4 * 2 + i];
          if (out_row < 0) continue;
          float* const to = part.out + out_row * part.out_stride + leaf * part.leaf_stride;
          const auto finished = [&](float sum) {
            if (F == Finish::rounded) return round_to(true, sum);
            if (F == Finish::capped) return p.softcap > 0 ? p.softcap * tanh_f32(sum / p.softcap) : sum;
            return sum;
          };
          if constexpr (kDealt) {
            const int row = x.row + row_warp * 32 + lane / 4 * 4;
            if (row < part.rows)
              *reinterpret_cast<float4*>(to + row) =
                  make_float4(finished(acc[0][n][i]), finished(acc[0][n][2 + i]), finished(acc[1][n][i]),
                              finished(acc[1][n][2 + i]));
          } else {
#pragma unroll
            for (int m = 0; m < kM; m++) {
              const int tile = row_warp * kM + m;
              const float low = acc[m][n][i], high = acc[m][n][2 + i];
              if (kGated) {
                const int row = x.row + tile * 8 + lane / 4;
                if (row < part.rows)
                  to[row] =
                      round_to(true, round_to(true, gelu_tanh(round_to(true, low))) * round_to(true, high));
                continue;
              }
              const int row = x.row + tile * 16 + lane / 4;
              if (row < part.rows) to[row] = finished(low);
              if (row + 8 < part.rows) to[row + 8] = finished(high);
            }
          }
        }
    };
    const auto end_leaf = [&](int leaf) {
      if (apart) {
        write(leaf);
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int n = 0; n < kN; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
        return;
      }
      // The left half of a pair of subtrees waits in the stack, a right half takes it from there.
      int level = 0;
#pragma unroll 1
      for (; leaf >> level & 1; level++) join_level<S>(acc, stack, level, false);
      if (leaf + 1 < leaves) join_level<S>(acc, stack, level, true);
    };
    const auto multiply_unit = [&]<bool Full>() {
      Step steps[2];
      const int first = sided ? team : 0;
      load.template operator()<Full>(steps[0], walk.at * R::kStage, first, 0, pairs);
      int leaf = 0, left = chunks;
#pragma unroll 1
      for (int c = 0; c < all_chunks; c += S::kWide) {
        const uint32_t stage = walk.at * R::kStage, done = full + 8;
        walk.advance(p.stages);
        full = barriers + walk.at * 16;
#pragma unroll
        for (int i = 0; i < S::kWide; i++) {
          if (sided ? i > 0 : c + i >= all_chunks) break;
          const int w = sided ? team : i;
          const bool leaves_stage = sided || i + 1 == S::kWide || c + i + 1 == all_chunks,
                     more = sided ? c + S::kWide < all_chunks : c + i + 1 < all_chunks;
#pragma unroll
          for (int step = 0; step < kSteps; step++) {
            const bool half = step * 16 + 8 == Chunk;
            if (step + 1 < kSteps) {
              load.template operator()<Full>(steps[(step + 1) % 2], stage, w, step + 1, pairs);
            } else if (more) {
              if (leaves_stage) wait_for(full, walk.phase);
              load.template operator()<Full>(steps[0], leaves_stage ? walk.at * R::kStage : stage,
                                             leaves_stage ? first : i + 1, 0, pairs);
            }
            const Step& now = steps[step % 2];
#pragma unroll
            for (int pair = 0; pair < kN / 2; pair++) {
              if (!Full && pair >= pairs) continue;
              const auto& b = now.b[pair];
#pragma unroll
              for (int m = 0; m < kM; m++) {
                const auto& a = now.a[m];
                constexpr bool kBoth = Full || !kOnePair;
                if (half) {
                  ptx::mma_m16n8k8(acc[m][2 * pair], a[0], a[1], b[0]);
                  if (kBoth) ptx::mma_m16n8k8(acc[m][2 * pair + 1], a[0], a[1], b[2]);
                } else {
                  multiply(acc[m][2 * pair], a[0], a[1], a[2], a[3], b[0], b[1]);
                  if (kBoth) multiply(acc[m][2 * pair + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                }
              }
            }
          }
          if (leaves_stage) {
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(done);
          }
          if (--left == 0) end_leaf(leaf), leaf++, left = chunks;
        }
      }
    };
    if (takes_part && (kOnePair ? tiles > 1 : pairs >= kN / 2)) {
      multiply_unit.template operator()<true>();
    } else if (takes_part) {
      multiply_unit.template operator()<false>();
    } else {
#pragma unroll 1
      for (int c = 0; c < all_chunks; c += S::kWide) {
        wait_for(barriers + walk.at * 16, walk.phase);
        __syncwarp();  // or a lane that still looks might miss the phase, and wait for the one after the next
        if (lane == 0) ptx::mbarrier_arrive(barriers + walk.at * 16 + 8);
        walk.advance(p.stages);
      }
    }
    if (apart) continue;
    if constexpr (S::kTeams > 1)
      if (sided) join_teams<S>(acc, stack + (levels - 1) * R::kLevel / 4, team);
    if (takes_part && team == 0) write(0);
  }
}

template <class S, int Chunk, Finish F>
__global__ void __launch_bounds__(S::kThreads, 1)
    multiply_grouped(const __grid_constant__ Parameters p, int levels) {
  TP_DYNAMIC_SHARED(char, shared, 1024);
  const Room<S, Chunk> room(p.stages, levels, p.experts);
  const uint32_t barriers = shared_address(shared + room.barriers);
  const Units<S> units(p, reinterpret_cast<int*>(shared + room.first_units));
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      ptx::mbarrier_init<S::kGivers + 1>(barriers + i * 16);
      ptx::mbarrier_init<S::kWarps>(barriers + i * 16 + 8);
    }
    ptx::fence_proxy_async();
  }
  // The kernel before this one rounds activations, and the experts' lists were made before that one, so they
  // may be read at once (rows.h says when that one may let this one start), and weights may come.
  units.fetch();
  if (warp == S::kWarps) units.count();
  __syncthreads();
  auto* const slots = reinterpret_cast<Slot<S>*>(shared + room.slots);
  if (warp == S::kWarps) return bring_weights<S, Chunk, F>(p, units, shared, slots, barriers);
  wait_for_inputs();
  let_next_start();
  if (warp > S::kWarps)
    return bring_tokens<S, Chunk>(p, units, shared, reinterpret_cast<int*>(shared + room.table), barriers,
                                  static_cast<int>(threadIdx.x) - (S::kWarps + 1) * 32);
  multiply_tiles<S, Chunk, F>(p, units, shared, reinterpret_cast<float*>(shared + room.stack), slots,
                              barriers, levels);
}

/// Fills in what follows from the shape, and starts the kernel.
template <class S, int Chunk, Finish F>
void launch_grouped(CudaBackend& backend, Parameters p) {
  constexpr bool kGated = F == Finish::gated;
  using R = Room<S, Chunk>;
  int levels = 0;  // of the stack; the last is where teams meet
  p.dense_units = 0;
  for (int i = 0; i < p.parts; i++) {
    Part& part = p.part[i];
    const int half = kGated ? S::kRows / 2 : S::kRows;
    part.tile_rows = half;
    part.tiles = (part.rows + half - 1) / half;
    if (part.columns > 0) p.dense_units += part.tiles * ((part.columns + S::kColumns - 1) / S::kColumns);
    part.teams = part.leaves % S::kTeams == 0 ? S::kTeams : 1;
    part.side = part.teams > 1 ? part.leaves / part.teams * part.chunks : 1;
    if (part.leaf_stride != 0) continue;
    int needed = part.teams > 1 ? 1 : 0;
    for (int leaves = part.leaves / part.teams; leaves > 1; leaves /= 2) needed++;
    if (needed > levels) levels = needed;
  }
  const int fixed = R(0, levels, p.experts).bytes;
  p.stages = least(kMostStages, (backend.shared_memory() - 2048 - fixed) / (R::kStage + R::kSlot + 16));
  backend.launch(multiply_grouped<S, Chunk, F>, dim3(static_cast<unsigned>(backend.processors())),
                 S::kThreads, static_cast<size_t>(R(p.stages, levels, p.experts).bytes), p, levels);
}

}  // namespace tp::cuda::grouped
