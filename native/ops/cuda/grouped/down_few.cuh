// Down for few tokens, where reading the weights is all. A block has some columns of the output, of all
// experts: it takes them in the order of their ids, so that a token's weighted sum grows in shared memory,
// leaf by leaf, and no assignment's leaves go through memory.
//
// A portion is the block's rows of one expert's matrix (or the dense MLP's) and up to 16 columns: tokens, or
// the expert's assignments. Eight warps multiply, one brings weights and one activations by the copy engine,
// up to four leaves at a time. A warp has one leaf. Where fewer than eight come at once there is more than
// one set of such warps; sets take portions by turns, and add their sums one after the other.
#pragma once

#include "ops/cuda/grouped/rows.h"
#include "ops/cuda/grouped/units.cuh"
#include "ops/cuda/matrix.h"

namespace tp::cuda::grouped::few {

constexpr int kWarps = 8;  // that multiply
constexpr int kThreads = 32 * (kWarps + 2);
constexpr int kColumns = 16;                           // of a portion
constexpr int kLeastRows = 16, kMostRows = 24;         // of the output's columns, a block's
constexpr int kChunk = 88, kChunkBytes = 2 * kChunk;   // of a leaf: what a stage has of it
constexpr int kMostStages = 16;                        // of all rings
constexpr uint64_t kEvictNormal = 0x1000000000000000;  // a cache policy, as createpolicy makes it

/// How leaves are dealt out.
template <int Leaves>
struct Deal {
  static constexpr int kTogether = Leaves < 4 ? Leaves : 4;  // of a stage
  static constexpr int kGroups = Leaves / kTogether;         // stages that have different leaves
  static constexpr int kSets = kWarps / kTogether;           // of warps
  /// Of a row, that come as one piece if they are neighbours.
  static constexpr int kPair = kTogether > 1 ? 2 : 1;
  static_assert(kSets % kGroups == 0, "a set has the same leaves in all its turns");
  /// Bytes between an expert's columns: pieces of 16 in an odd number, so that eight rows lie in all banks.
  static constexpr int kPitch = (kTogether * kChunkBytes / 16 | 1) * 16;
};

/// In a stage lie the rows' pieces, of kPair leaves each or of one, as (piece of a row, row, its bytes).
struct Weights {
  CUtensorMap map;  // (element of a piece, row, piece); a box is what a stage has
  int chunks;       // of a leaf
  int leaves;       // of a piece; of two they are neighbours
  int pitch;        // bytes from a row's piece to the next row's: 16 in an odd number
};

struct Parameters {
  Weights dense, experts;
  CUtensorMap dense_tokens;   // the same of the dense MLP's activations
  const Bf16* expert_tokens;  // (T * K, moeInter)
  const int* expert_start;    // (E + 1)
  const int* assignment;      // (T * K)
  const float* route_weight;  // (T, K)
  float* sum;                 // (T, 2, H)
  Divider by_top_k;
  int tokens, assignments, expert_count, hidden, inter, moe_inter;
  int rows;   // of a block
  int slots;  // of a set's ring
};

/// Assignments of one expert that are columns of a portion.
struct Portion {
  int expert, first, count;
};
/// An assignment in the list sorted by expert.
struct Assignment {
  int row;  // of the experts' activations
  int to;   // its token's first sum
  float weight;
};

/// Shared memory of a block: the sets' slots, then the sums (leaf, token, kMostRows), the assignments and the
/// experts' portions.
template <int Leaves>
struct Room {
  using D = Deal<Leaves>;
  int weight_bytes, slot_bytes, sums, assignments, portions, starts, bytes;
  __host__ __device__ Room(const Parameters& p) {
    weight_bytes = up(D::kTogether * p.rows * (kChunkBytes + 16 / D::kPair), 128);
    slot_bytes = weight_bytes + up(kColumns * D::kPitch, 128);
    sums = D::kSets * p.slots * slot_bytes;
    assignments = sums + Leaves * p.tokens * kMostRows * 4;
    portions = assignments + p.assignments * static_cast<int>(sizeof(Assignment));
    starts = portions + p.assignments * static_cast<int>(sizeof(Portion));
    bytes = starts + (p.expert_count + 1) * 4;
  }
};

/// Lists the experts' portions in the order of their ids; how many there are. starts: (E + 1). By one warp.
__device__ inline int list_portions(const int* starts, int experts, Portion* to) {
  return number_experts(
      starts, experts, 0, [](int count) { return (count + kColumns - 1) / kColumns; },
      [&](int e, int start, int count, int first, int portions) {
        for (int i = 0; i < portions; i++)
          to[first + i] = {e, start + i * kColumns, min(kColumns, count - i * kColumns)};
      });
}

/// The stages of a block in their order: of the dense MLP's portions, then of the experts', portion after
/// portion; of a portion its groups of leaves, of those their chunks. A group of leaves is one set's turn.
/// Every set has a ring of its own: of a slot that sets share, one might see what the next one's phase is
/// while the other still waits, since copies end in any order.
template <int Leaves>
class Walk {
 public:
  using D = Deal<Leaves>;
  __device__ Walk(const Parameters& p, int experts)
      : slots_(p.slots),
        dense_(p.inter > 0 ? (p.tokens + kColumns - 1) / kColumns * D::kGroups : 0),
        all_(dense_ + experts * D::kGroups),
        dense_chunks_(p.dense.chunks),
        expert_chunks_(p.experts.chunks) {}
  __device__ bool more() const { return turn_ < all_; }
  __device__ bool dense() const { return turn_ < dense_; }
  __device__ int chunks() const { return dense() ? dense_chunks_ : expert_chunks_; }
  __device__ int chunk() const { return chunk_; }
  __device__ int portion() const { return (dense() ? turn_ : turn_ - dense_) / D::kGroups; }
  __device__ int group() const { return turn_ % D::kGroups; }
  /// Which of the experts' turns.
  __device__ int of_experts() const { return turn_ - dense_; }
  __device__ int set() const { return turn_ % D::kSets; }
  /// The slot, and how often it was filled before: the phase of its barriers.
  __device__ int slot() const { return set() * slots_ + at(); }
  __device__ uint32_t phase() const { return phase_ >> set() & 1; }
  /// To the next stage.
  __device__ void next() {
    const int before = at(), after = before + 1 < slots_ ? before + 1 : 0;
    if (after == 0) phase_ ^= 1u << set();
    at_ ^= static_cast<uint64_t>(before ^ after) << 8 * set();
    if (++chunk_ == chunks()) chunk_ = 0, turn_++;
  }
  /// Past turns of other sets.
  __device__ void pass(int turns) { turn_ += turns; }

 private:
  const int slots_, dense_, all_, dense_chunks_, expert_chunks_;
  __device__ int at() const { return static_cast<int>(at_ >> 8 * set() & 255); }
  int turn_ = 0, chunk_ = 0;
  uint64_t at_ = 0;     // in a set's ring, a byte a set
  uint32_t phase_ = 0;  // a bit a set
};

/// By one warp.
template <int Leaves>
__device__ void bring_weights(const Parameters& p, const Room<Leaves>& room, const char* shared,
                              uint32_t barriers, int portions) {
  using D = Deal<Leaves>;
  if (threadIdx.x % 32 > 0) return;
  const auto* const portion = reinterpret_cast<const Portion*>(shared + room.portions);
  const int first_row = static_cast<int>(blockIdx.x) * p.rows;
#pragma unroll 1
  for (Walk<Leaves> walk(p, portions); walk.more(); walk.next()) {
    const uint32_t full = barriers + walk.slot() * 16,
                   to = shared_address(shared) + walk.slot() * room.slot_bytes;
    const Weights& weights = walk.dense() ? p.dense : p.experts;
    const int pieces = D::kTogether / weights.leaves;
    const int row = first_row + (walk.dense() ? 0 : portion[walk.portion()].expert * p.hidden);
    wait_for(full + 8, walk.phase() ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, pieces * p.rows * weights.pitch);
    ptx::cp_async_bulk_tensor_3d(to, &weights.map, walk.chunk() * kChunk, row, walk.group() * pieces, full);
  }
}

/// By one warp.
template <int Leaves>
__device__ void bring_tokens(const Parameters& p, const Room<Leaves>& room, const char* shared,
                             uint32_t barriers, int portions) {
  using D = Deal<Leaves>;
  const auto* const assignment = reinterpret_cast<const Assignment*>(shared + room.assignments);
  const auto* const portion = reinterpret_cast<const Portion*>(shared + room.portions);
  const int lane = threadIdx.x % 32, chunks = p.experts.chunks;
  const int pieces = chunks == 1 ? 1 : D::kTogether, bytes = D::kTogether / pieces * kChunkBytes;  // of a row
#pragma unroll 1
  for (Walk<Leaves> walk(p, portions); walk.more(); walk.next()) {
    const uint32_t full = barriers + walk.slot() * 16,
                   to = shared_address(shared) + walk.slot() * room.slot_bytes + room.weight_bytes;
    const int leaf = walk.group() * D::kTogether;
    const Portion x = walk.dense() ? Portion{0, 0, kColumns} : portion[walk.portion()];
    wait_for(full + 8, walk.phase() ^ 1);
    if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, x.count * D::kTogether * kChunkBytes);
    __syncwarp();
    if (walk.dense()) {
      if (lane == 0)
        ptx::cp_async_bulk_tensor_3d(to, &p.dense_tokens, walk.chunk() * kChunk, walk.portion() * kColumns,
                                     leaf, full);
      continue;
    }
    for (int i = lane; i < x.count * pieces; i += 32) {
      const int column = pieces == 1 ? i : i / D::kTogether, l = pieces == 1 ? 0 : i % D::kTogether;
      const Bf16* const from = p.expert_tokens + int64_t{assignment[x.first + column].row} * p.moe_inter +
                               ((leaf + l) * chunks + walk.chunk()) * kChunk;
      ptx::cp_async_bulk(to + column * D::kPitch + l * kChunkBytes, from, bytes, full, kEvictNormal);
    }
  }
}

/// A leaf's chunk of both, as the tensor cores take it: pieces of 8 elements, two of them a step.
struct Operands {
  static constexpr int kSteps = kChunk / 16;
  static_assert(kChunk == 88 && kMostRows == 24 && kColumns == 16);
  uint32_t tokens[2][3][4];  // columns 0 to 7 and 8 to 15, four pieces at a time
  uint32_t low[kSteps][4];   // rows 0 to 15, a step at a time
  uint32_t low_rest[2];      // their last piece
  uint32_t high[3][4];       // rows 16 to 23, as the tokens

  /// From the shared addresses of the leaf's first column and first row; `both`: more than 8 columns.
  __device__ __forceinline__ void load(uint32_t first_column, int column_pitch, uint32_t first_row,
                                       int row_pitch, bool both) {
    const int row = threadIdx.x % 8, matrix = threadIdx.x % 32 / 8;
    const uint32_t column = first_column + row * column_pitch + matrix * 16,
                   of_high = first_row + (16 + row) * row_pitch + matrix * 16,
                   of_low = first_row + (matrix % 2 * 8 + row) * row_pitch + matrix / 2 * 16;
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const int at = i * 64 - (i == 2 && matrix == 3 ? 16 : 0);  // there is no twelfth piece
      ptx::ldmatrix_x4(tokens[0][i], column + at);
      if (both) ptx::ldmatrix_x4(tokens[1][i], column + 8 * column_pitch + at);
      ptx::ldmatrix_x4(high[i], of_high + at);
    }
#pragma unroll
    for (int step = 0; step < kSteps; step++) ptx::ldmatrix_x4(low[step], of_low + step * 32);
    ptx::ldmatrix_x2(low_rest[0], low_rest[1], of_low + kSteps * 32);
  }
};

/// A warp's products of one leaf, of columns 0 to 7 and 8 to 15: a lane has rows r = lane / 4 and r + 8, and
/// of the second tile r + 16, of columns 2 (lane % 4) and the next.
struct Products {
  float low[2][4] = {}, high[2][4] = {};

  __device__ __forceinline__ void add(const Operands& x, bool both) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      if (n > 0 && !both) continue;
      const auto& b = x.tokens[n];
#pragma unroll
      for (int step = 0; step < Operands::kSteps; step++) {
        const auto& a = x.low[step];
        const int i = step / 2, j = step % 2 * 2;
        ptx::mma_m16n8k16(low[n], a[0], a[1], a[2], a[3], b[i][j], b[i][j + 1]);
        ptx::mma_m16n8k16(high[n], x.high[i][j], 0, x.high[i][j + 1], 0, b[i][j], b[i][j + 1]);
      }
      ptx::mma_m16n8k8(low[n], x.low_rest[0], x.low_rest[1], b[2][2]);
      ptx::mma_m16n8k8(high[n], x.high[2][2], 0, b[2][2]);
    }
  }
};

/// Where a lane's products go: the sum of row lane / 4 of each of its columns, null where there is no column,
/// and the weight that the column's token gives the expert.
struct Targets {
  float* sum[2][2] = {};
  float weight[2][2];

  /// Adds an expert's; the dense MLP's are the first.
  __device__ __forceinline__ void take(const Products& products, bool dense) const {
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float* const to = sum[n][i];
        if (!to) continue;
        const float x[3] = {products.low[n][i], products.low[n][2 + i], products.high[n][i]};
        const float before[3] = {to[0], to[8], to[16]};
#pragma unroll
        for (int m = 0; m < 3; m++) to[m * 8] = dense ? x[m] : fused(weight[n][i], x[m], before[m]);
      }
  }
};

/// What the eight warps do.
template <int Leaves>
__device__ void multiply_all(const Parameters& p, const Room<Leaves>& room, char* shared, uint32_t barriers,
                             int portions) {
  using D = Deal<Leaves>;
  const auto* const assignment = reinterpret_cast<const Assignment*>(shared + room.assignments);
  const auto* const portion = reinterpret_cast<const Portion*>(shared + room.portions);
  auto* const sums = reinterpret_cast<float*>(shared + room.sums);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, set = warp / D::kTogether,
            own = warp % D::kTogether;  // leaf of a stage
  const uint32_t turns = barriers + kMostStages * 16;
  const int of_leaf = p.tokens * kMostRows;

  // Sums of `which` go out, and make room for the next.
  const auto finish = [&](int which) {
    ptx::bar_sync<1, 32 * kWarps>();
#pragma unroll 1
    for (int t = warp; t < p.tokens; t += kWarps) {
      const int row = static_cast<int>(blockIdx.x) * p.rows + lane;
      if (lane >= p.rows || row >= p.hidden) continue;
      float* const from = sums + t * kMostRows + lane;
      p.sum[(int64_t{t} * 2 + which) * p.hidden + row] = tree_sum(from, Leaves, of_leaf);
    }
    ptx::bar_sync<1, 32 * kWarps>();
  };
  const auto clear = [&] {
    for (int i = static_cast<int>(threadIdx.x); i < Leaves * of_leaf; i += 32 * kWarps) sums[i] = 0;
    ptx::bar_sync<1, 32 * kWarps>();
  };

  Walk<Leaves> walk(p, portions);
  walk.pass(set);
  const auto take = [&](bool dense) {
#pragma unroll 1
    while (walk.more() && walk.dense() == dense) {
      const Weights& weights = dense ? p.dense : p.experts;
      const int own_weights =
          own / weights.leaves * p.rows * weights.pitch + own % weights.leaves * kChunkBytes;
      const int token_pitch = dense ? kChunkBytes : D::kPitch,
                token_leaf = dense ? kColumns * kChunkBytes : kChunkBytes;
      const int leaf = walk.group() * D::kTogether + own, turn = walk.of_experts();
      const Portion x =
          dense ? Portion{0, walk.portion() * kColumns, min(kColumns, p.tokens - walk.portion() * kColumns)}
                : portion[walk.portion()];
      Targets targets;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (column >= x.count) continue;
        const Assignment a =
            dense ? Assignment{0, (x.first + column) * kMostRows, 0} : assignment[x.first + column];
        targets.sum[i / 2][i % 2] = sums + leaf * of_leaf + a.to + lane / 4;
        targets.weight[i / 2][i % 2] = a.weight;
      }
      const bool both = x.count > 8;
      Products products;
#pragma unroll 1
      for (int chunks = walk.chunks(); chunks > 0; chunks--, walk.next()) {
        const uint32_t full = barriers + walk.slot() * 16;
        const uint32_t slot = shared_address(shared) + walk.slot() * room.slot_bytes;
        wait_for(full, walk.phase());
        Operands operands;
        operands.load(slot + room.weight_bytes + own * token_leaf, token_pitch, slot + own_weights,
                      weights.pitch, both);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(full + 8);
        products.add(operands, both);
      }
      // The experts before this one have been added.
      constexpr bool kTurns = D::kSets > D::kGroups;
      if (kTurns && !dense && turn >= D::kGroups)
        wait_for(turns + ((set + D::kSets - D::kGroups) % D::kSets * D::kTogether + own) * 8,
                 (turn - D::kGroups) / D::kSets & 1);
      targets.take(products, dense);
      __syncwarp();
      if (kTurns && !dense && lane == 0) ptx::mbarrier_arrive(turns + warp * 8);
      walk.pass(D::kSets - 1);
    }
  };
  if (p.inter > 0) take(true), finish(0);
  clear();
  take(false);
  finish(1);
}

template <int Leaves>
__global__ void __launch_bounds__(kThreads, 1) down_few(const __grid_constant__ Parameters p) {
  using D = Deal<Leaves>;
  TP_DYNAMIC_SHARED(char, shared, 128);
  __shared__ uint64_t barrier[2 * kMostStages + kWarps];
  __shared__ int portions;
  const Room<Leaves> room(p);
  const uint32_t barriers = shared_address(barrier);
  if (threadIdx.x == 0) {
    for (int i = 0; i < D::kSets * p.slots; i++) {
      ptx::mbarrier_init<2>(barriers + i * 16);
      ptx::mbarrier_init<D::kTogether>(barriers + i * 16 + 8);
    }
    for (int i = 0; i < kWarps; i++) ptx::mbarrier_init<1>(barriers + kMostStages * 16 + i * 8);
    ptx::fence_proxy_async();
  }
  // The router's lists were made before the kernel in front of this one could start.
  auto* const starts = reinterpret_cast<int*>(shared + room.starts);
  for (int i = static_cast<int>(threadIdx.x); i <= p.expert_count; i += kThreads)
    starts[i] = __ldcg(p.expert_start + i);
  auto* const assignment = reinterpret_cast<Assignment*>(shared + room.assignments);
  for (int i = static_cast<int>(threadIdx.x); i < p.assignments; i += kThreads) {
    const int row = __ldcg(p.assignment + i);
    assignment[i] = {row, p.by_top_k.of(row) * kMostRows, __ldcg(p.route_weight + row)};
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp == kWarps) {
    const int count =
        list_portions(starts, p.expert_count, reinterpret_cast<Portion*>(shared + room.portions));
    if (threadIdx.x % 32 == 0) portions = count;
  }
  __syncthreads();
  if (warp == kWarps) return bring_weights<Leaves>(p, room, shared, barriers, portions);
  wait_for_inputs();
  let_next_start();
  if (warp > kWarps) return bring_tokens<Leaves>(p, room, shared, barriers, portions);
  multiply_all<Leaves>(p, room, shared, barriers, portions);
}

/// dense_act, expert_act: the activations as bfloat16, which a kernel in front of this one makes.
inline void down(const DownArgs& a, const Dims& d, int tokens, const Bf16* dense_act, const Bf16* expert_act,
                 CudaBackend& backend) {
  with_leaves(d.leaves, [&]<int Leaves>() {
    using D = Deal<Leaves>;
    Parameters p{};
    // Blocks of the same width, in as few rounds as can be.
    const int blocks = backend.processors(),
              rounds = (d.hidden + blocks * kMostRows - 1) / (blocks * kMostRows),
              each = (d.hidden + rounds * blocks - 1) / (rounds * blocks);
    p.rows = up(each > kLeastRows ? each : kLeastRows, 2);
    const auto weights = [&](const Bf16* data, int64_t rows, int width) -> Weights {
      const int chunks = width / Leaves / kChunk, leaves = chunks == 1 ? D::kPair : 1,
                pitch = (leaves * kChunkBytes / 16 | 1) * 16;
      return {map_of_pieces(data, rows, leaves * chunks * kChunk, Leaves / leaves, pitch / 2, p.rows,
                            D::kTogether / leaves),
              chunks, leaves, pitch};
    };
    p.experts = weights(a.expert_down, int64_t{d.experts} * d.hidden, d.moe_inter);
    if (d.inter > 0) {
      p.dense = weights(a.down, d.hidden, d.inter);
      p.dense_tokens =
          map_of_pieces(dense_act, tokens, d.inter / Leaves, Leaves, kChunk, kColumns, D::kTogether);
    }
    p.expert_tokens = expert_act;
    p.expert_start = a.expert_start, p.assignment = a.assignment, p.route_weight = a.route_weight;
    p.sum = a.sum;
    p.by_top_k = divider(d.top_k);
    p.tokens = tokens, p.assignments = tokens * d.top_k, p.expert_count = d.experts;
    p.hidden = d.hidden, p.inter = d.inter, p.moe_inter = d.moe_inter;
    const int fixed = Room<Leaves>(p).bytes, room = backend.shared_memory() - 1024;
    p.slots = least(kMostStages, (room - fixed) / Room<Leaves>(p).slot_bytes) / D::kSets;
    if (p.slots < 1)
      fail("TP_LIMIT",
           "down of %d tokens and %d experts a token: a block has %d bytes of shared memory, its sums and "
           "lists take %d; shorten --prefill-chunk or --batch-size",
           tokens, d.top_k, room, fixed);
    backend.launch(down_few<Leaves>, dim3(static_cast<unsigned>((d.hidden + p.rows - 1) / p.rows)), kThreads,
                   static_cast<size_t>(Room<Leaves>(p).bytes), p);
  });
}

}  // namespace tp::cuda::grouped::few
