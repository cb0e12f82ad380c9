// The warps of the grouped kernels (grouped.cuh) that bring weights and activations into the stages.
#pragma once

#include "ops/cuda/grouped/units.cuh"

namespace tp::cuda::grouped {

/// Brings weights, and says what the units are. By one warp.
template <class S, int Chunk, Finish F>
__device__ void bring_weights(const Parameters& p, const Units<S>& units, char* stages, Slot<S>* slots,
                              uint32_t barriers) {
  using R = Room<S, Chunk>;
  constexpr int kHalf = F == Finish::gated ? S::kRows / 2 : S::kRows, kPer = (S::kColumns + 31) / 32;
  const int lane = threadIdx.x % 32, total = units.total();
  // The rows of output of the next unit are asked for while this one's weights come.
  Unit next;
  int out_row[kPer];
  const auto look = [&](int u) {
    if (u >= total) return;
    next = units.unit(u);
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      const int column = lane + 32 * i;
      out_row[i] = column >= next.count            ? -1
                   : p.part[next.part].columns > 0 ? next.column + column
                                                   : __ldcg(p.assignment + next.start + next.column + column);
    }
  };
  look(blockIdx.x);
  Walk walk;
  int slot = 0;
#pragma unroll 1
  for (int u = blockIdx.x; u < total; u += gridDim.x) {
    const Unit x = next;
    const Part& part = p.part[x.part];
    constexpr bool kDealt = kIsDealt<S, F>;
    const int boxes = (min(kHalf, part.rows - x.row) + part.box - 1) / part.box;
    const int copies = kDealt ? 4 : F == Finish::gated ? 2 * boxes : boxes;
    const int box_bytes = (kDealt ? S::kRows / 4 : part.box) * R::kPitch;
    const bool is_high = !kDealt && lane >= boxes;
    const int box = is_high ? lane - boxes : lane;
    const CUtensorMap* const map = is_high ? &part.high : &part.low;
    const int row = x.weight_row + box * part.box + (is_high ? part.high_row : 0);
    const int offset = (is_high ? kHalf * R::kPitch : 0) + box * box_bytes;
    const int chunks = part.leaves * part.chunks;
#pragma unroll 1
    for (int c = 0; c < chunks; c += S::kWide) {
      const uint32_t full = barriers + walk.at * 16;
      const int pieces = min(S::kWide, chunks - c);
      wait_for(full + 8, walk.phase ^ 1);
      if (c == 0) {
        Slot<S>& known = slots[slot];
        if (lane == 0) known.part = x.part, known.row = x.row, known.count = x.count;
#pragma unroll
        for (int i = 0; i < kPer; i++)
          if (lane + 32 * i < S::kColumns) known.out_row[lane + 32 * i] = out_row[i];
        if (++slot > p.stages) slot = 0;
        __syncwarp();
      }
      if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, pieces * copies * box_bytes);
      __syncwarp();
      const uint32_t to = shared_address(stages) + walk.at * R::kStage + offset;
#pragma unroll
      for (int w = 0; w < S::kWide; w++)
        if (lane < copies && w < pieces) {
          const int column = part.chunk(c, w, S::kWide) * Chunk;
          const uint32_t there = to + R::weights_at(w);
          if constexpr (kDealt)
            ptx::cp_async_bulk_tensor_3d(there, map, column, lane, x.weight_row / 4, full);
          else if (p.once)  // nobody else will want them: they need not stay in the second-level cache
            ptx::cp_async_bulk_tensor(there, map, column, row, full, kEvictFirst);
          else
            ptx::cp_async_bulk_tensor(there, map, column, row, full);
        }
      if (c == 0) look(u + gridDim.x);
      walk.advance(p.stages);
    }
  }
}

/// Brings the activations of the columns: tokens follow each other in memory, an expert's are spread. By
/// S::kGivers threads.
template <class S, int Chunk>
__device__ void bring_tokens(const Parameters& p, const Units<S>& units, char* stages, int* tables,
                             uint32_t barriers, int thread) {
  using R = Room<S, Chunk>;
  constexpr int kPieces = Chunk / 8;
  constexpr int kPer = (S::kColumns + S::kGivers - 1) / S::kGivers;
  const int total = units.total();
  Unit next;
  int rows[kPer];
  const auto look = [&](int u) {
    if (u >= total) return;
    next = units.unit(u);
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      const int column = thread + i * S::kGivers;
      if (p.part[next.part].columns == 0 && column < next.count)
        rows[i] = __ldcg(p.assignment + next.start + next.column + column);
    }
  };
  look(blockIdx.x);
  Walk walk;
  int turn = 0;
#pragma unroll 1
  for (int u = blockIdx.x; u < total; u += gridDim.x, turn ^= 1) {
    const Unit x = next;
    const Part& part = p.part[x.part];
    const int chunks = part.leaves * part.chunks;
    const auto each_stage = [&](auto&& bring) {
#pragma unroll 1
      for (int c = 0; c < chunks; c += S::kWide) {
        const uint32_t full = barriers + walk.at * 16;
        wait_for(full + 8, walk.phase ^ 1);
        bring(c, full, shared_address(stages) + walk.at * R::kStage);
        walk.advance(p.stages);
      }
    };
    if (part.columns > 0) {
      look(u + gridDim.x);
      each_stage([&](int c, uint32_t full, uint32_t to) {
        if (thread > 0) return ptx::mbarrier_arrive(full);
        const int pieces = min(S::kWide, chunks - c);
        ptx::mbarrier_arrive_expect_tx(full, pieces * part.token_box * R::kPitch);
#pragma unroll
        for (int w = 0; w < S::kWide; w++)
          if (w < pieces)
            ptx::cp_async_bulk_tensor(to + R::tokens_at(w), &part.token_rows,
                                      part.chunk(c, w, S::kWide) * Chunk, x.column, full);
      });
      continue;
    }
    int* const table = tables + turn * S::kColumns;
    const int columns = x.count;  // what lies in the others' places does not touch these columns' sums
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      const int column = thread + i * S::kGivers;
      if (column < columns) table[column] = p.token_of.of(rows[i]);
    }
    ptx::bar_sync<1, S::kGivers>();
    look(u + gridDim.x);
    each_stage([&](int c, uint32_t full, uint32_t to) {
      constexpr int kAll = S::kWide * kPieces;
#pragma unroll 4
      for (int i = thread; i < columns * kAll; i += S::kGivers) {
        const int row = i / kAll, all = i % kAll, w = all / kPieces, piece = all % kPieces;
        if (S::kWide > 1 && c + w >= chunks) continue;
        const Bf16* const from =
            part.tokens + static_cast<int64_t>(table[row]) * part.width + c * Chunk + all * 8;
        const int place = Chunk == 64 ? piece ^ row % 8 : piece;
        ptx::cp_async_16(to + R::tokens_at(w) + row * R::kPitch + place * 16, from);
      }
      ptx::cp_async_mbarrier_arrive(full);
    });
  }
}

}  // namespace tp::cuda::grouped
