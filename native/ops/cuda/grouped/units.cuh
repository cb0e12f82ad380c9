// The work of the grouped kernels (grouped.cuh): shapes of tiles, what is multiplied, the room of a block,
// and the tiles in their order.
#pragma once

#include "ops/cuda/gemv.cuh"

namespace tp::cuda::grouped {

/// How a block's warps share a tile: every warp takes RowTiles x 16 rows by ColumnTiles x 8 columns. A stage
/// holds up to Wide chunks of its rows: longer pieces of a row come faster, and barriers cost less. Sided:
/// there is a team of such warps for each of those chunks, and they are of different leaves, so that a row's
/// leaves are summed side by side.
template <int RowWarps, int RowTiles, int ColumnWarps, int ColumnTiles, int Wide, bool Sided = false>
struct Shape {
  static constexpr int kRowWarps = RowWarps, kRowTiles = RowTiles, kColumnTiles = ColumnTiles, kWide = Wide;
  static constexpr int kTeams = Sided ? Wide : 1, kTeamWarps = RowWarps * ColumnWarps,
                       kWarps = kTeams * kTeamWarps;
  static constexpr int kRows = RowWarps * RowTiles * 16, kColumns = ColumnWarps * ColumnTiles * 8;
  static constexpr int kGivers = 96;  // threads that bring activations
  static constexpr int kThreads = kWarps * 32 + 32 + kGivers;
};

/// Tiles for a few columns, where reading the weights is all: fine enough that all processors have the same
/// work, and of many warps, because a row's products wait for each other. An expert has few tokens, so its
/// tiles are narrower.
using Few16 = Shape<1, 1, 2, 2, 4, true>;
using Few32 = Shape<2, 1, 2, 2, 4>;
using Few64 = Shape<4, 1, 2, 2, 2>;
using Leaves32 = Shape<2, 1, 2, 2, 4, true>;
using Experts64 = Shape<4, 1, 1, 2, 4>;
/// For more columns than those hold.
using Wide32 = Shape<2, 1, 4, 2, 4>;
using Wide64 = Shape<4, 1, 4, 2, 2>;
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
  CUtensorMap token_rows;     // of a matrix: its tokens
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
  int teams, side;            // that share a row's leaves, and chunks from one team's to the next one's
  int columns;                // tokens; 0: the assignments of the experts
  int token_box;              // rows of tokens that one copy brings

  /// Where chunk w of a stage lies in the row. c: the chunks of the stages before it.
  __device__ int chunk(int c, int w, int wide) const { return side > 1 ? c / wide + w * side : c + w; }
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

/// Shared memory of a block: the stages, then the stack of leaves, where the experts' units and assignments
/// begin, the activation rows of two units, the slots (one more than stages: when a unit's first stage is
/// free, all warps have left the unit that had its slot before) and the barriers.
template <class S, int Chunk>
struct Room {
  static constexpr int kPitch = Chunk * 2;  // bytes of a chunk, and from an activation's row to the next
  static constexpr int kWeights = S::kWide * S::kRows * kPitch, kTokens = S::kColumns * kPitch;
  static constexpr int kStage = kWeights + S::kWide * kTokens;
  /// Where a stage's chunk w lies.
  static __host__ __device__ constexpr int weights_at(int w) { return w * S::kRows * kPitch; }
  static __host__ __device__ constexpr int tokens_at(int w) { return kWeights + w * kTokens; }
  static constexpr int kLevel = S::kTeams * S::kRows * S::kColumns * 4;
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

/// Walks through the stages of the ring; every role has its own.
struct Walk {
  int at = 0;
  uint32_t phase = 0;
  __device__ void advance(int stages) {
    if (++at == stages) at = 0, phase ^= 1;
  }
};

/// Numbers what experts are cut into, expert after expert, from `done` on: one with `count` assignments into
/// parts_of(count), of which put(expert, where its assignments start, count, first, parts) is told, also of
/// experts beyond the last, which have none. starts: (E + 1). Returns the number behind the last. By one
/// warp.
template <class PartsOf, class Put>
__device__ inline int number_experts(const int* starts, int experts, int done, PartsOf&& parts_of,
                                     Put&& put) {
#pragma unroll 1
  for (int e0 = 0; e0 < experts; e0 += 32) {
    const int e = e0 + threadIdx.x % 32, start = starts[min(e, experts)],
              count = starts[min(e + 1, experts)] - start, parts = parts_of(count);
    const int end = done + sum_up_to_lane(parts);
    put(e, start, count, end - parts, parts);
    done = __shfl_sync(~0u, end, 31);
  }
  return done;
}

/// All units of the kernel in their order: dense parts, then expert after expert; of a row tile all columns
/// follow each other, so that its weights come from memory once.
template <class S>
class Units {
 public:
  __device__ Units(const Parameters& p, int* room)
      : p_(p), first_(room), start_(room + p.experts + 1), step_(1) {
    while (2 * step_ < p.experts) step_ *= 2;
  }

  /// By all threads, before count().
  __device__ void fetch() const {
    for (int e = static_cast<int>(threadIdx.x); p_.experts > 0 && e <= p_.experts; e += S::kThreads)
      start_[e] = __ldcg(p_.expert_start + e);
    __syncthreads();
  }
  /// By one warp; then the block meets.
  __device__ void count() const {
    const auto units_of = [&](int count) {
      return (count + S::kColumns - 1) / S::kColumns * p_.part[p_.parts - 1].tiles;
    };
    const int all =
        number_experts(start_, p_.experts, p_.dense_units, units_of, [&](int e, int, int, int first, int) {
          if (e < p_.experts) first_[e] = first;
        });
    if (threadIdx.x % 32 == 0) first_[p_.experts] = all;
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

}  // namespace tp::cuda::grouped
