// Weight rows times the tokens' activations, slot by slot: tensor-core products of bfloat16 with fp32 sums, 8
// weight rows by up to 8 tokens at once; more tokens are products of the same weights with each eight. What a
// token's column holds never changes what its neighbours compute, so a token's bits do not depend on the
// batch.
//
// The columns of a portion are shared out among the warps. Their sums lie side by side in shared memory until
// all warps are done with a few portions; then a thread joins those of an output, in an order that the
// matrix's shape fixes.
#pragma once

#include "ops/cuda/resident/ring.cuh"
#include "ops/cuda/resident/rows.cuh"

namespace TP_RESIDENT {

/// The experts that the step's tokens chose, each once, in the order of their ids.
struct Chosen {
  int count;
  int expert[kMostChosen];
  uint64_t slots[kTokenGroups][kMostChosen];  // a byte a token: which of its K experts, 0xff = not chosen
  // Of each token, its experts in the order of their ids: which of its K, and the routing weight.
  int of_token[kMostTokens][kMostTopK];
  float weight[kMostTokens][kMostTopK];
  __device__ int slot(int i, int token) const {
    return static_cast<signed char>(slots[token / kColumns][i] >> (8 * (token % kColumns)));
  }
};

struct Tasks;  // of attention

/// What every stage sees.
struct Context {
  const Parameters& p;
  const PeerMemory& peers;
  int tokens, warp, lane;
  int column, quarter;  // of a product: the token of the lane's operand, and which 8 of every 32 elements
  Ring ring;
  ArrivalCounter grid, early;
  Sums sums;
  char* residual;   // bfloat16: the row of the residual stream that the block keeps
  char* acts;       // bfloat16 activations
  float* exchange;  // 2 turns of kRoomFloats
  Chosen* chosen;
  uint32_t listed;     // barrier: `chosen` is there, for the warp that fills the ring
  const Tasks* tasks;  // (2) of layers with a window, without
  int sum_turn;        // of the sum over ranks under way
  int turn = 0;
  int layer;
  bool first, last;           // stage of this launch
  uint64_t* marks = nullptr;  // (4) of the stage, null = this block does not measure

  __device__ void mark(int i) const {
    if (marks && threadIdx.x == 0) marks[i] = ptx::globaltimer();
  }
  /// A token alone: every block makes its rows for itself, which takes less time than to wait for another
  /// block's.
  __device__ bool alone() const { return p.in.tokens == 1; }
  /// The token whose rows the block would make: there may be none of that number.
  __device__ int own() const { return static_cast<int>(blockIdx.x) - p.first_owner; }
  /// The block makes a token's rows, and has it in the residual stream's memory.
  __device__ bool owner() const { return static_cast<unsigned>(own()) < static_cast<unsigned>(p.in.tokens); }
  __device__ int row() const { return alone() ? 0 : own(); }
  __device__ void next_sum() { sum_turn = (sum_turn + 1) % kInboxTurns; }
  /// A rounded value for the stages to come, or, at the end of the launch, where the ops' contract has it.
  __device__ void leave(float* contract, Bf16* to, int64_t at, float value) const {
    if (last)
      contract[at] = value;
    else
      to[operand_at(at)] = to_bf16(value);
  }
  /// Weights of the norm that the layer after this one, or the head, begins with.
  __device__ const Bf16* following_norm() const {
    return layer + 1 < p.layer_count ? p.layers[layer + 1].qkv.norm : p.logits.norm;
  }
  /// Where the experts' inputs lie beside those of the dense MLP, rows of `stride` bytes; null: no room, they
  /// take turns.
  __device__ char* expert_room(int stride) const {
    return 2 * tokens * stride <= p.act_bytes ? acts + tokens * stride : nullptr;
  }
  __device__ float* next_room() {
    turn ^= 1;
    return exchange + turn * kRoomFloats;
  }
};

__device__ inline void multiply(float (&acc)[4], uint32_t a0, uint32_t a2, uint32_t b0, uint32_t b1) {
  ptx::mma_m16n8k16(acc, a0, 0, a2, 0, b0, b1);
}

/// Products of 8 weight rows with up to 8 tokens. A lane brings 16 bytes of the weight row and of the token
/// of its column, and gets the sums of that weight row for tokens 2 * quarter and the one behind.
///
/// A tensor-core product has 16 rows: the first and third pair of a lane's 8 weights are taken as of row r,
/// the second and fourth as of row r + 8, so that nothing has to be moved. Multiplied with the activations of
/// the one half, rows r are wanted, with those of the other, rows r + 8; the other sums are thrown away.
struct Product {
  float acc[2][4] = {};
  __device__ __forceinline__ void add(const uint4& w, const uint4& x) {
    ptx::mma_m16n8k16(acc[0], w.x, w.y, w.z, w.w, x.x, x.y);
    ptx::mma_m16n8k16(acc[1], w.x, w.y, w.z, w.w, x.z, x.w);
  }
  __device__ __forceinline__ float sum(int i) const { return acc[0][i] + acc[1][2 + i]; }
};

/// What a lane brings of a row's `Pieces` pieces of 8 elements, from where its first lies: a piece of every
/// four.
template <int Pieces>
struct Operand {
  static constexpr int kSteps = (Pieces + 3) / 4;
  uint4 x[kSteps];
  /// Whether the row has a piece for the lane in step i: only of a last one a question when it runs.
  static __device__ __forceinline__ bool has(int i, int quarter) {
    return i * 4 + 3 < Pieces || i * 4 + quarter < Pieces;
  }
  __device__ __forceinline__ void load(uint32_t from, int quarter, bool held = true) {
#pragma unroll
    for (int i = 0; i < kSteps; i++) x[i] = ptx::ld_shared_v4(from + i * 64, held && has(i, quarter));
  }
  /// From memory: what other blocks have written.
  __device__ __forceinline__ void load(const Bf16* from, int quarter, bool held) {
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      x[i] = make_uint4(0, 0, 0, 0);
      if (held && has(i, quarter)) x[i] = __ldcg(reinterpret_cast<const uint4*>(from + i * 32));
    }
  }
  /// The same of rows that begin in the same banks: every other row brings its steps as second, first,
  /// fourth, third, ...
  __device__ __forceinline__ void load_in_turns(uint32_t from, int quarter, bool second_first) {
    static_assert(Pieces % 4 == 0 || kSteps % 2 == 1, "a step that is not whole has no other to change with");
    const uint32_t even = from + (second_first ? 64 : 0), odd = from + (second_first ? 0 : 64);
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      const bool alone = i + 1 == kSteps && i % 2 == 0;
      x[i] = ptx::ld_shared_v4((alone ? from : i % 2 ? odd : even) + i / 2 * 128, has(i, quarter));
    }
  }
  __device__ __forceinline__ void put_in_order(bool second_first) {
#pragma unroll
    for (int i = 0; i + 1 < kSteps; i += 2) {
      const uint4 first = x[i], second = x[i + 1];
      x[i] = second_first ? second : first, x[i + 1] = second_first ? first : second;
    }
  }
};

/// The activations of a stage: a row a token in shared memory, or the experts' of many tokens in any.
struct Acts {
  const char* data;
  int stride;  // bytes
};

/// The row of a portion that lanes of a column bring: neighbouring columns have the same row of neighbouring
/// slots, which begins in the same banks.
__device__ __forceinline__ int row_of(int column) { return (column & 1) * kSlotRows + column / 2; }

/// Portions that lie in a room.
struct Taken {
  RingAt at;  // behind them
  int portions;
  bool last;  // of the stage
};

/// Of a portion in a room, its unit.
__device__ __forceinline__ int& unit_in(float* room, int portion) {
  return reinterpret_cast<int*>(room + kGroup * kWarps * kSumFloats)[portion];
}
static_assert(kRoomFloats >= kGroup * kWarps * kSumFloats + kGroup);

/// Takes the next portions of the stage, kGroup of them or what is left, and leaves their sums in the room,
/// for all threads. A warp takes a chunk of `Pieces` pieces of every row; a portion has `chunks` of them.
/// Parts: a unit has `parts` portions, each of its own activations. One code for all matrices with rows of
/// that length: it should stay in the instruction cache. So it is called, and returns how far the ring is.
template <int Pieces, bool Parts>
__device__ __noinline__ Taken take_portions(Ring ring, const PeerMemory& peers, int parts, int chunks,
                                            uint32_t acts, int stride, int tokens, float* const sums) {
  const int warp = warp_index(), column = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
  const int row = row_of(column), row_bytes = chunks * Pieces * 16;
  const uint32_t offset = warp * Pieces * 16 + quarter * 16;
  acts += column * stride + offset;
  float* const room = sums + warp * kSumFloats + 2 * quarter * kUnitRows + row;
  const bool computes = __any_sync(~0u, warp < chunks);
  constexpr bool kKept = !Parts && kFewTokens;  // activations, in registers through all portions
  Operand<Pieces> x;
  const auto load = [&](int group, int part) {
    const int token = group * kColumns;
    x.load(acts + token * stride + part * row_bytes, quarter, token + column < tokens);
  };
  if (kKept) load(0, 0);
  int n = 0;
  bool last = false;
#pragma unroll 1
  for (; n < kGroup && !last; n++) {
    ring.wait_full(peers);
    const UnitName name = ring.unit();
    const int part = Parts ? n & (parts - 1) : 0;
    if (computes) {
      Operand<Pieces> w;
      w.load_in_turns(ring.row(row, row_bytes) + offset, quarter, column % 2 == 1);
      if (!kKept) load(0, part);
      __syncwarp();  // all loads are on their way before the first is waited for
      w.put_in_order(column % 2 == 1);
      ring.release();
#pragma unroll
      for (int g = 0; g < kTokenGroups; g++) {
        if (g > 0) load(g, part);
        Product product;
#pragma unroll
        for (int i = 0; i < w.kSteps; i++) product.add(w.x[i], x.x[i]);
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (g * kColumns + 2 * quarter + i < tokens)
            room[n * kWarps * kSumFloats + (g * kColumns + i) * kUnitRows] = product.sum(i);
      }
    } else {
      ring.release();
    }
    if (threadIdx.x == 0) unit_in(sums, n) = name.unit();
    last = __any_sync(~0u, name.last());
  }
  sync_consumers();
  return {ring.at(), n, last};
}

/// Takes all portions of a schedule. done(first, units, room) is called by all threads when the sums of
/// `units` of the block's units, from its first-th on, are in the room.
template <int Pieces, bool Parts = false, class Done>
__device__ __forceinline__ void consume(Context& c, const Schedule& schedule, int chunks, const Acts& acts,
                                        Done&& done) {
  const int shift = Parts ? __ffs(schedule.parts) - 1 : 0;  // a power of two
  bool more = __any_sync(~0u, schedule.units > 0);
#pragma unroll 1
  for (int first = 0; more;) {
    float* const room = c.next_room();
    const Taken taken = take_portions<Pieces, Parts>(
        c.ring, c.peers, schedule.parts, chunks, ptx::shared_address(acts.data), acts.stride, c.tokens, room);
    c.ring.go_to(taken.at);
    const int units = taken.portions >> shift;
    done(first, units, room);
    first += units, more = __any_sync(~0u, !taken.last);
  }
}

/// An output of rows that `chunks` warps share, a power of two: their sums in tree order.
__device__ __forceinline__ float joined(const float* room, int unit, int token, int row,
                                        int chunks = kWarps) {
  const float* const from = room + unit * kWarps * kSumFloats + token * kUnitRows + row;
  float sum[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; w++) sum[w] = w < chunks ? from[w * kSumFloats] : 0;
#pragma unroll
  for (int span = 1; span < kWarps; span *= 2)
    if (span < chunks)
#pragma unroll
      for (int w = 0; w < kWarps; w += 2 * span) sum[w] += sum[w + span];
  return sum[0];
}

/// The same of a unit of 1, 2 or 4 portions.
__device__ __forceinline__ float joined_parts(const float* room, int parts, int chunks, int unit, int token,
                                              int row) {
  float even = 0, pair = 0, sum = 0;
#pragma unroll 1
  for (int part = 0; part < parts; part++) {
    const float x = joined(room, unit * parts + part, token, row, chunks);
    if (part % 2 == 0)
      sum = even = x;
    else if (part == 1)
      sum = pair = even + x;
    else
      sum = pair + (even + x);
  }
  return sum;
}

/// Calls each(unit, token, row) for `rows` of the 8 rows of every unit and every token, a thread each. Whole:
/// also for tokens that are not there, so that warps stay together.
template <int Rows, bool Whole = false, class Each>
__device__ __forceinline__ void each_output(const Context& c, int units, Each&& each) {
#pragma unroll 1
  for (int i = threadIdx.x; i < units * Rows * kMostTokens; i += kThreads) {
    const int token = i / Rows % kMostTokens;
    if (Whole || token < c.tokens) each(i / (Rows * kMostTokens), token, i % Rows);
  }
}

/// Starts to bring rows of activations that other blocks have left, `width` elements of rows that lie `pitch`
/// apart: ptx::cp_async_wait_all() before they are read. Warps share a row where there are more of them;
/// index: which row each column reads, null = its own. Out of line: many stages come here.
__device__ __noinline__ inline void fetch_acts(char* to, int stride, const Bf16* from, int rows, int width,
                                               int pitch, const int* index = nullptr) {
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int shift = rows > 4 ? 0 : rows > 2 ? 1 : rows > 1 ? 2 : 3;  // of the warps that share a row
  const int first = ((warp & ((1 << shift) - 1)) * 32 + lane) * 8;
#pragma unroll 1
  for (int r = warp >> shift; r < rows; r += kWarps >> shift) {
    const Bf16* const row = from + static_cast<int64_t>(index ? index[r] : r) * pitch;
#pragma unroll 1
    for (int at = first; at < width; at += 256 << shift)
      ptx::cp_async_16(ptx::shared_address(to + r * stride + at * 2), row + at);
  }
}

/// The same from fp32 memory, where a stage begins the launch.
__device__ __forceinline__ void load_acts(char* to, int stride, const float* from, int rows, int width,
                                          int pitch) {
  const int pieces = width / 4;
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * pieces; i += kThreads) {
    const int row = i / pieces, at = (i - row * pieces) * 4;
    const float4 x = __ldcg(reinterpret_cast<const float4*>(from + static_cast<int64_t>(row) * pitch + at));
    put_four(to + row * stride, at, x);
  }
}

/// Rows of the residual stream, normed and weighted, by each block for itself: where a stage begins the
/// launch. Out of line, and without the context, which would have to lie in memory. `sums` are after next();
/// `index`: which row each token reads, null = its own.
__device__ __noinline__ inline void norm_rows(char* to, int tokens, int n, float eps, Sums sums,
                                              const float* hidden, const Bf16* norm, const int* index) {
  const int stride = stride_of(2 * n);
  // Their place is the last row's until then.
  char* const room = to + (tokens - 1) * stride;
  NormWeights weights;
  NormWeights::ask(room, norm);
  ptx::cp_async_wait_all();
  weights.get(room);
  __syncwarp();
#pragma unroll 2
  for (int t = 0; t < tokens; t++) {
    Row row;
    row.load(hidden + static_cast<int64_t>(index ? index[t] : t) * n, n);
    row.put(to + t * stride, n);  // as they are: they are bfloat16-valued
    sums.give(t, row.squares());
  }
  sync_consumers();
#pragma unroll 1
  for (int t = 0; t < tokens; t++) {
    const float inverse = inverse_rms_of<kRowLength>(sums.take(t), eps);
    Row row;
    row.get(to + t * stride, n);
    row.change([&](float x, int p, int j) { return x * inverse * weights.at(p, j); });
    row.put(to + t * stride, n);
  }
}
__device__ __forceinline__ void load_normed(Context& c, const float* hidden, const Bf16* norm,
                                            const int* index = nullptr) {
  c.sums.next();
  norm_rows(c.acts, c.tokens, c.p.dims.hidden, c.p.dims.eps, c.sums, hidden, norm, index);
}

}  // namespace TP_RESIDENT
