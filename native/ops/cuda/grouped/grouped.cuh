// Weight rows times many columns of activations, every weight read once for all of them.
//
// A block takes tiles of weight rows by columns (tokens, or the assignments of one expert) by turns. One warp
// brings weights by the copy engine, a few more bring the columns' activations by 16-byte copies, both into
// the same ring of stages, as far ahead as there is room; the other warps multiply: tensor-core products of
// bfloat16 with fp32 sums. A sum goes along its leaf (or the whole row) in steps of 16 elements, the last of
// a piece of 88 has 8, so its bits depend on nothing but its own weights and activations: not on the tile,
// the other columns, the number of tokens or the TP degree. Leaves meet in tree order, or are written apart.
#pragma once

#include "ops/cuda/gemv.cuh"

namespace tp::cuda::grouped {

/// How a block's warps share a tile: every warp takes RowTiles x 16 rows by ColumnTiles x 8 columns. A stage
/// holds up to Wide chunks of its rows: longer pieces of a row come faster, and barriers cost less.
template <int RowWarps, int RowTiles, int ColumnWarps, int ColumnTiles, int Wide>
struct Shape {
  static constexpr int kRowWarps = RowWarps, kRowTiles = RowTiles, kColumnTiles = ColumnTiles, kWide = Wide;
  static constexpr int kWarps = RowWarps * ColumnWarps;
  static constexpr int kRows = RowWarps * RowTiles * 16, kColumns = ColumnWarps * ColumnTiles * 8;
  static constexpr int kGivers = 96;  // threads that bring activations
  static constexpr int kThreads = kWarps * 32 + 32 + kGivers;
};

/// Tiles for a few columns, where reading the weights is all: fine enough that all processors have the same
/// work. An expert has few tokens, so its tiles are narrow.
using Few16 = Shape<1, 1, 1, 4, 4>;
using Few32 = Shape<2, 1, 1, 4, 4>;
using Few64 = Shape<4, 1, 1, 4, 2>;
using Experts64 = Shape<4, 1, 1, 2, 4>;
using Experts128 = Shape<8, 1, 1, 2, 2>;
/// For many columns, where multiplying is all.
using Many64 = Shape<4, 2, 2, 4, 1>;
using Many128 = Shape<4, 2, 2, 8, 1>;

/// What becomes of a sum.
enum class Finish {
  sums,     // as it is
  rounded,  // to bfloat16
  capped,   // softcap
  gated,    // GELU(gate) * up
};

/// Whether a warp's 32 rows are dealt out to its four quarter tiles by turns, so that a lane gets four
/// neighbours and a warp writes whole cache lines. Such rows come by maps of every fourth row.
template <class S, Finish F>
constexpr bool kIsDealt = S::kRowTiles == 2 && F != Finish::gated;

/// A weight matrix, or one for every expert, times rows of activations.
struct Part {
  CUtensorMap low, high;      // high: of gated tiles the up rows, whose gate rows come by `low`
  const Bf16* tokens;         // (activation rows, width)
  float* out;                 // (rows of output, rows of the weight matrix)
  int64_t out_stride;         // from one row of output to the next
  int64_t leaf_stride;        // from one leaf to the next where leaves stay apart, else 0
  int rows;                   // output columns: weight rows of a matrix (gated: gate rows)
  int first_row, all_rows;    // weight rows before those (a slice), and of a matrix, for finding an expert's
  int high_row;               // rows from a gate row to its up row, when both come by one matrix
  int box;                    // rows that one copy brings
  int tiles, tile_rows;       // tiles of rows, and rows of a tile (gated: gate rows)
  int width, leaves, chunks;  // elements of a row, cut into leaves, each into chunks
  int columns;                // tokens; 0: the assignments of the experts
};

constexpr int kMostParts = 3, kMostStages = 24;
constexpr uint64_t kEvictFirst = 0x12f0000000000000;  // a cache policy, as createpolicy makes it

struct Parameters {
  Part part[kMostParts];  // the experts' is the last
  int parts, dense_units, stages;
  int experts;              // 0: none
  const int* expert_start;  // (E + 1)
  const int* assignment;    // (T * K) output rows of the experts' columns
  Divider token_of;         // activation row of an assignment
  float softcap;
  bool once;  // every weight is read by one block
};

/// One tile.
struct Unit {
  int part, weight_row, row, column, count, start;
};

/// What the multiplying warps know of a tile; it is there with the tile's first stage.
template <class S>
struct Slot {
  int part, row, count;
  int out_row[S::kColumns];
};

inline __host__ __device__ int up(int x, int to) { return (x + to - 1) / to * to; }

/// Shared memory of a block: the stages, then the stack of leaves, where the experts' units and assignments
/// begin, the activation rows of two units, the slots (one more than stages: when a unit's first stage is
/// free, all warps have left the unit that had its slot before) and the barriers.
template <class S, int Chunk>
struct Room {
  static constexpr int kPitch = Chunk * 2, kWeights = S::kRows * kPitch;
  static constexpr int kPiece = kWeights + S::kColumns * kPitch, kStage = S::kWide * kPiece;
  static constexpr int kLevel = S::kRows * S::kColumns * 4;
  static constexpr int kSlot = sizeof(Slot<S>);
  int stack, first_units, table, slots, barriers, bytes;
  __host__ __device__ Room(int stages, int levels, int experts) {
    stack = stages * kStage;
    first_units = stack + levels * kLevel;
    table = first_units + up(2 * (experts + 1) * 4, 16);
    slots = table + 2 * S::kColumns * 4;
    barriers = slots + up((stages + 1) * kSlot, 16);
    bytes = barriers + stages * 16;
  }
};

__device__ inline void four_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
/// acc += 16 rows x 8 elements times 8 elements x 8 columns.
__device__ inline void multiply_half(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Walks through the stages of the ring; every role has its own.
struct Walk {
  int at = 0;
  uint32_t phase = 0;
  __device__ void advance(int stages) {
    if (++at == stages) at = 0, phase ^= 1;
  }
};

/// All units of the kernel in their order: dense parts, then expert after expert; of a row tile all columns
/// follow each other, so that its weights come from memory once.
template <class S>
class Units {
 public:
  __device__ Units(const Parameters& p, int* room)
      : p_(p), first_(room), start_(room + p.experts + 1), step_(1) {
    while (2 * step_ < p.experts) step_ *= 2;
  }

  /// By one warp; then the block meets.
  __device__ void count() const {
    const int lane = threadIdx.x % 32;
    int done = p_.dense_units;
#pragma unroll 1
    for (int e0 = 0; p_.experts > 0 && e0 <= p_.experts; e0 += 32) {
      const int e = e0 + lane;
      const int start = e <= p_.experts ? __ldcg(p_.expert_start + e) : 0;
      const int n = e < p_.experts ? __ldcg(p_.expert_start + e + 1) - start : 0;
      if (e <= p_.experts) start_[e] = start;
      const int units = (n + S::kColumns - 1) / S::kColumns * p_.part[p_.parts - 1].tiles;
      int sum = units;
      for (int span = 1; span < 32; span *= 2) {
        const int other = __shfl_up_sync(~0u, sum, span);
        if (lane >= span) sum += other;
      }
      if (e < p_.experts) first_[e] = done + sum - units;
      done += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) first_[p_.experts] = done;
  }
  __device__ int total() const { return first_[p_.experts]; }
  __device__ Unit unit(int u) const {
    Unit x{};
    if (u < p_.dense_units) {
      int columns;
      for (;; x.part++) {
        columns = (p_.part[x.part].columns + S::kColumns - 1) / S::kColumns;
        if (u < columns * p_.part[x.part].tiles) break;
        u -= columns * p_.part[x.part].tiles;
      }
      const Part& part = p_.part[x.part];
      return place(x, part, u, columns, part.columns, 0);
    }
    int e = 0;
    for (int step = step_; step > 0; step /= 2)
      if (e + step < p_.experts && first_[e + step] <= u) e += step;
    // Experts without a token have no units: this is the last that begins here, the one that has.
    x.part = p_.parts - 1;
    x.start = start_[e];
    const int n = start_[e + 1] - x.start;
    return place(x, p_.part[x.part], u - first_[e], (n + S::kColumns - 1) / S::kColumns, n, e);
  }

 private:
  static __device__ Unit place(Unit x, const Part& part, int u, int columns, int all, int expert) {
    const int tile = columns == 1 ? u : u / columns;
    x.row = tile * part.tile_rows;
    x.weight_row = expert * part.all_rows + part.first_row + x.row;
    x.column = (u - tile * columns) * S::kColumns;
    x.count = min(S::kColumns, all - x.column);
    return x;
  }
  const Parameters& p_;
  int *first_, *start_;  // units and assignments before each expert's
  int step_;             // the search's first
};

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
      if (lane == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(full),
                     "r"(pieces * copies * box_bytes)
                     : "memory");
      __syncwarp();
      const uint32_t to = shared_address(stages) + walk.at * R::kStage + offset;
#pragma unroll
      for (int w = 0; w < S::kWide; w++)
        if (lane < copies && w < pieces) {
          if constexpr (kDealt)
            asm volatile(
                "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
                "%3, %4}], [%5];" ::"r"(to + w * R::kPiece),
                "l"(map), "r"((c + w) * Chunk), "r"(lane), "r"(x.weight_row / 4), "r"(full)
                : "memory");
          else if (p.once)  // nobody else will want them: they need not stay in the second-level cache
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to + w * R::kPiece),
                "l"(map), "r"((c + w) * Chunk), "r"(row), "r"(full), "l"(kEvictFirst)
                : "memory");
          else
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
                "%3}], [%4];" ::"r"(to + w * R::kPiece),
                "l"(map), "r"((c + w) * Chunk), "r"(row), "r"(full)
                : "memory");
        }
      if (c == 0) look(u + gridDim.x);
      walk.advance(p.stages);
    }
  }
}

/// Brings the activations of the columns. By S::kGivers threads.
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
      if (column >= next.count) continue;
      rows[i] = p.part[next.part].columns > 0 ? next.column + column
                                              : __ldcg(p.assignment + next.start + next.column + column);
    }
  };
  look(blockIdx.x);
  Walk walk;
  int turn = 0;
#pragma unroll 1
  for (int u = blockIdx.x; u < total; u += gridDim.x, turn ^= 1) {
    const Unit x = next;
    const Part& part = p.part[x.part];
    int* const table = tables + turn * S::kColumns;
    const int columns = x.count;  // what lies in the others' places does not touch these columns' sums
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      const int column = thread + i * S::kGivers;
      if (column < columns) table[column] = part.columns > 0 ? rows[i] : p.token_of.of(rows[i]);
    }
    asm volatile("bar.sync 1, %0;" ::"n"(S::kGivers) : "memory");
    look(u + gridDim.x);
    const int chunks = part.leaves * part.chunks;
#pragma unroll 1
    for (int c = 0; c < chunks; c += S::kWide) {
      const uint32_t full = barriers + walk.at * 16;
      wait_for(full + 8, walk.phase ^ 1);
      const uint32_t to = shared_address(stages) + walk.at * R::kStage + R::kWeights;
      constexpr int kAll = S::kWide * kPieces;
#pragma unroll 4
      for (int i = thread; i < columns * kAll; i += S::kGivers) {
        const int row = i / kAll, all = i % kAll, w = all / kPieces, piece = all % kPieces;
        if (S::kWide > 1 && c + w >= chunks) continue;
        const Bf16* const from =
            part.tokens + static_cast<int64_t>(table[row]) * part.width + c * Chunk + all * 8;
        const int place = Chunk == 64 ? piece ^ row % 8 : piece;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + w * R::kPiece + row * R::kPitch +
                                                                       place * 16),
                     "l"(from)
                     : "memory");
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full) : "memory");
      walk.advance(p.stages);
    }
  }
}

/// Adds a level of the stack to the sums, or moves the sums there. A thread has places of its own.
template <class S, int M, int N>
__device__ inline void join_level(float (&acc)[M][N][4], float* stack, int level, bool keep) {
  float* const place = stack + level * S::kRows * S::kColumns + threadIdx.x;
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

/// Multiplies: a warp's part of every tile.
template <class S, int Chunk, Finish F>
__device__ void multiply_tiles(const Parameters& p, const Units<S>& units, char* stages, float* stack,
                               const Slot<S>* slots, uint32_t barriers) {
  using R = Room<S, Chunk>;
  constexpr int kM = S::kRowTiles, kN = S::kColumnTiles, kSteps = (Chunk + 15) / 16;
  constexpr bool kGated = F == Finish::gated, kDealt = kIsDealt<S, F>;
  static_assert(kN % 2 == 0 && kSteps % 2 == 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, total = units.total();
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
  const uint32_t b_row =
      shared_address(stages) + R::kWeights + (first_column + lane / 16 * 8 + lane % 8) * R::kPitch;
  const int a_piece = lane / 16, b_piece = lane / 8 % 2;
  const auto at = [&](int piece) { return (Chunk == 64 ? piece ^ lane % 8 : piece) * 16; };
  // A step's elements of weights and activations; the next step's come while this one's are multiplied.
  struct Step {
    uint32_t a[kM][4], b[kN / 2][4];
  };
  const auto load = [&]<bool Full>(Step& to, uint32_t stage, int step, int pairs) {
    const bool half = step * 16 + 8 == Chunk;
#pragma unroll
    for (int m = 0; m < kM; m++)
      four_matrices(to.a[m], a_row[m] + stage + at(2 * step + (half ? 0 : a_piece)));
#pragma unroll
    for (int pair = 0; pair < kN / 2; pair++)
      if (Full || pair < pairs)
        four_matrices(to.b[pair],
                      b_row + stage + pair * 16 * R::kPitch + at(2 * step + (half ? 0 : b_piece)));
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
    const int pairs = (x.count - first_column + 15) / 16;  // of column tiles that hold columns
    const int chunks = part.chunks, all_chunks = part.leaves * chunks;
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
            continue;
          }
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
    };
    const auto end_leaf = [&](int leaf) {
      if (part.leaf_stride != 0) {
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
      if (leaf + 1 < part.leaves) join_level<S>(acc, stack, level, true);
    };
    const auto multiply_unit = [&]<bool Full>() {
      Step steps[2];
      load.template operator()<Full>(steps[0], walk.at * R::kStage, 0, pairs);
      int leaf = 0, left = chunks;
#pragma unroll 1
      for (int c = 0; c < all_chunks; c += S::kWide) {
        const uint32_t stage = walk.at * R::kStage, done = full + 8;
        walk.advance(p.stages);
        full = barriers + walk.at * 16;
#pragma unroll
        for (int w = 0; w < S::kWide; w++) {
          if (c + w >= all_chunks) break;
#pragma unroll
          for (int step = 0; step < kSteps; step++) {
            const bool half = step * 16 + 8 == Chunk;
            if (step + 1 < kSteps) {
              load.template operator()<Full>(steps[(step + 1) % 2], stage + w * R::kPiece, step + 1, pairs);
            } else if (c + w + 1 < all_chunks) {
              if (w + 1 == S::kWide) wait_for(full, walk.phase);
              load.template operator()<Full>(
                  steps[0], w + 1 == S::kWide ? walk.at * R::kStage : stage + (w + 1) * R::kPiece, 0, pairs);
            }
            const Step& now = steps[step % 2];
#pragma unroll
            for (int pair = 0; pair < kN / 2; pair++) {
              if (!Full && pair >= pairs) continue;
              const auto& b = now.b[pair];
#pragma unroll
              for (int m = 0; m < kM; m++) {
                const auto& a = now.a[m];
                if (half) {
                  multiply_half(acc[m][2 * pair], a[0], a[1], b[0]);
                  multiply_half(acc[m][2 * pair + 1], a[0], a[1], b[2]);
                } else {
                  multiply(acc[m][2 * pair], a[0], a[1], a[2], a[3], b[0], b[1]);
                  multiply(acc[m][2 * pair + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                }
              }
            }
          }
          if (w + 1 == S::kWide || c + w + 1 == all_chunks) {
            __syncwarp();
            if (lane == 0) arrive(done);
          }
          if (--left == 0) end_leaf(leaf++), left = chunks;
        }
      }
    };
    if (pairs >= kN / 2) {
      multiply_unit.template operator()<true>();
    } else if (pairs > 0) {
      multiply_unit.template operator()<false>();
    } else {
#pragma unroll 1
      for (int c = 0; c < all_chunks; c += S::kWide) {
        wait_for(barriers + walk.at * 16, walk.phase);
        if (lane == 0) arrive(barriers + walk.at * 16 + 8);
        walk.advance(p.stages);
      }
    }
    if (part.leaf_stride == 0 && pairs > 0) write(0);
  }
}

template <class S, int Chunk, Finish F>
__global__ void __launch_bounds__(S::kThreads, 1)
    multiply_grouped(const __grid_constant__ Parameters p, int levels) {
  extern __shared__ __align__(1024) char shared[];
  const Room<S, Chunk> room(p.stages, levels, p.experts);
  const uint32_t barriers = shared_address(shared + room.barriers);
  const Units<S> units(p, reinterpret_cast<int*>(shared + room.first_units));
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barriers + i * 16), "n"(S::kGivers + 1));
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barriers + i * 16 + 8), "n"(S::kWarps));
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  // The kernel before this one rounds activations, and the experts' lists were made before that one, so they
  // may be read at once (rows.h says when that one may let this one start), and weights may come.
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
                              barriers);
}

/// Fills in what follows from the shape, and starts the kernel.
template <class S, int Chunk, Finish F>
void launch_grouped(CudaBackend& backend, Parameters p) {
  constexpr bool kGated = F == Finish::gated;
  using R = Room<S, Chunk>;
  int levels = 0;
  p.dense_units = 0;
  for (int i = 0; i < p.parts; i++) {
    Part& part = p.part[i];
    const int half = kGated ? S::kRows / 2 : S::kRows;
    part.tile_rows = half;
    part.tiles = (part.rows + half - 1) / half;
    if (part.columns > 0) p.dense_units += part.tiles * ((part.columns + S::kColumns - 1) / S::kColumns);
    if (part.leaf_stride == 0)
      while (1 << levels < part.leaves) levels++;
  }
  const int fixed = R(0, levels, p.experts).bytes;
  p.stages = least(kMostStages, (backend.shared_memory() - 2048 - fixed) / (R::kStage + R::kSlot + 16));
  backend.launch(multiply_grouped<S, Chunk, F>, dim3(static_cast<unsigned>(backend.processors())),
                 S::kThreads, static_cast<size_t>(R(p.stages, levels, p.experts).bytes), p, levels);
}

}  // namespace tp::cuda::grouped
