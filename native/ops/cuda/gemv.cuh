// Weight rows times a few columns of activations: the inner loop of every matrix op.
//
// A block of 16 warps stays on its multiprocessor and streams tiles of 16 weight rows through shared memory.
// The columns (K) of a row are cut into segments, a warp takes one segment of a tile, and the warps of a tile
// form a group: for sums that tensor parallelism splits a segment is a leaf, so one warp sums one leaf in an
// order that depends on its length alone; else there are 8 segments of whole cache lines. Segments meet in
// tree order.
//
// Products are tensor-core products of bfloat16 with fp32 sums, up to 8 columns at once: one token is one
// column, or in float32 runs three, because an fp32 value is exactly the sum of three bfloat16 planes. What a
// column holds never changes what its neighbours compute, so a token's bits do not depend on the batch.
//
// Every warp has a ring of slots of its own, a slot being the tile's 16 rows by `chunk` elements, and four
// more warps do nothing but keep the rings filled by the copy engine. The copies run as far ahead as there is
// room, without a barrier between warps, and start before the kernel's inputs are there.
#pragma once

#include <climits>

#include "ops/cuda/block.cuh"
#include "ops/cuda/matrix.h"

namespace tp::cuda {

constexpr int kTileRows = 16;
constexpr int kColumns = 8;
constexpr int kSegments = 8;  // of a row that tensor parallelism does not split
constexpr int kLine = 64;     // elements of a cache line
constexpr int kMostChunk = 96, kMostSlots = 16;

inline __host__ __device__ int least(int a, int b) { return a < b ? a : b; }

/// How rows of `total` elements are cut. All segments take the same number of chunks; the last may find
/// nothing there.
struct Split {
  int total;          // elements of a row
  int segments;       // warps of a group; a power of two
  int length;         // elements of a segment; the last ones may have fewer or none
  int chunk, chunks;  // elements of a row in one slot, a multiple of 32; slots of a segment
  int first, step;    // chunk c of segment s begins at first * s + step * c
  int padded;         // and lies in shared memory at padded * s + step * c
  int plane;          // room of a column; 64 bytes past a multiple of 128, so that columns use other banks
  bool leaves;        // segments are leaves
  bool
      aligned;  // every piece of 8 elements begins at a multiple of 16 bytes, so the copy engine can bring it

  __host__ __device__ int from(int segment, int c) const { return first * segment + step * c; }
  /// Elements from the segment's first one on that belong to it.
  __host__ __device__ int size(int segment) const { return least(length, total - first * segment); }
  __host__ __device__ int slot_bytes() const { return kTileRows * chunk * static_cast<int>(sizeof(Bf16)); }
};

inline Split split_whole(int total) {
  Split s{};
  s.total = total, s.segments = kSegments, s.chunk = s.step = kLine;
  s.chunks = (total + kSegments * kLine - 1) / (kSegments * kLine);
  s.length = s.first = s.padded = s.chunks * kLine;
  s.plane = (total + 63) / 64 * 64 + 32;
  s.aligned = total % 8 == 0;
  return s;
}
inline Split split_leaves(int total, int leaves) {
  Split s{};
  s.total = total, s.segments = leaves, s.leaves = true;
  s.first = s.length = total / leaves;
  s.padded = (s.length + 7) / 8 * 8;
  s.aligned = s.length % 8 == 0;
  const int most = s.length % kLine == 0 ? kLine : kMostChunk, count = (s.length + most - 1) / most;
  s.chunk = s.step = ((s.length + count - 1) / count + 31) / 32 * 32;
  s.chunks = (s.length + s.chunk - 1) / s.chunk;
  s.plane = (leaves * s.padded + 63) / 64 * 64 + 32;
  return s;
}

/// `box`: rows that one copy brings, a tile's 16 or half of them.
/// Rows of one cache line are laid out so that neighbours use other banks.
inline __host__ __device__ bool swizzled(int chunk) { return chunk == kLine; }

inline Matrix matrix_of(const Bf16* data, int64_t rows, const Split& s, int box = kTileRows) {
  return matrix_of(data, rows, s.total, s.chunk, box, swizzled(s.chunk), s.aligned);
}

/// Tokens as columns.
struct Columns {
  int first;   // first token
  int tokens;  // tokens in this launch
  int planes;  // columns of a token: 1, or 3 in float32 runs
};

/// A warp's place. Warp w is segment w % segments of group w / segments of the block.
struct Place {
  int warp, lane, row, quarter;  // of a tile: rows `row` and `row + 8`, elements 8 * quarter .. of every 32
  int segment, group;            // in the block
  int groups, global_group;      // in the grid
  int thread, threads;           // in the group, of the group

  __device__ Place(int segments, int warp_, int lane_) : warp(warp_), lane(lane_) {
    const int shift = __ffs(segments) - 1;
    row = lane / 4;
    quarter = lane % 4;
    segment = warp & (segments - 1);
    group = warp >> shift;
    groups = gridDim.x * (kWarps >> shift);
    global_group = group * gridDim.x + blockIdx.x;
    threads = segments * 32;
    thread = segment * 32 + lane;
  }
  __device__ void meet() const {
    if (threads == 32)
      __syncwarp();
    else
      ptx::bar_sync(group + 1, threads);
  }
  /// How many of `tiles` tiles this group takes: its own number, then every `groups`th.
  __device__ int share(int tiles) const {
    return tiles <= global_group ? 0 : __float2int_rd(__fdividef(tiles - global_group - 0.5f, groups)) + 1;
  }
};

inline int tiles_of(int rows) { return (rows + kTileRows - 1) / kTileRows; }

/// Neighbouring rows of a matrix.
struct Rows {
  const Matrix* matrix;
  int first;
};

/// The 16 rows of a tile: neighbours, or, when `high` has a matrix, 8 and 8.
struct Tile {
  Rows low, high;
};

/// Where a walk through the units of a group stands: a tile, and of an expert tile the expert.
struct Cursor {
  int tile = 0, part = 0;
  __device__ void advance(int parts) {
    if (++part == parts) part = 0, tile++;
  }
};

using ptx::shared_address;

/// Waits until the phase of a barrier in shared memory with that parity is over. Gives up after minutes: what
/// it waits for will not come, and a kernel that hangs would take the GPU with it.
__device__ inline void wait_for(uint32_t barrier, uint32_t parity) {
  uint64_t begin = 0;
  for (int tries = 0;; tries++) {
    if (ptx::mbarrier_try_wait(barrier, parity)) return;
    if (tries % 4096 != 4095) continue;
    const uint64_t now = ptx::globaltimer();
    if (begin == 0) begin = now;
    if (now - begin > 200'000'000'000ull) __trap();
  }
}

/// One warp's ring of slots, as the thread that fills or the warp that takes walks through it. Shared memory:
/// two barriers (arrived, free) for every slot of every warp, then the slots.
class Ring {
 public:
  __device__ Ring(char* memory, int warp, int slots, int bytes)
      : slots_(slots),
        bytes_(bytes),
        barriers_(shared_address(memory) + warp * kMostSlots * 16),
        data_(memory + kWarps * kMostSlots * 16 + warp * slots * bytes) {}

  /// By one thread, before others use the ring.
  __device__ void prepare() const {
    for (int i = 0; i < 2 * slots_; i++) ptx::mbarrier_init<1>(barriers_ + i * 8);
    ptx::fence_proxy_async();
  }
  __device__ void advance() {
    if (++at_ == slots_) at_ = 0, phase_ ^= 1;
  }
  /// Asks for a tile's rows from element k on, as soon as the slot is free, and goes on. By one thread.
  __device__ void ask(const Tile& tile, int k, int bytes) {
    const uint32_t arrived = barriers_ + at_ * 16, slot = shared_address(data_) + at_ * bytes_;
    wait_for(arrived + 8, phase_ ^ 1);
    ptx::mbarrier_arrive_expect_tx(arrived, bytes);
    copy(slot, tile.low, k, arrived);
    if (tile.high.matrix) copy(slot + bytes / 2, tile.high, k, arrived);
    advance();
  }
  /// The oldest slot, when it is there. The warp gives it back by release() when all lanes have read.
  __device__ const Bf16* take() const {
    wait_for(barriers_ + at_ * 16, phase_);
    return reinterpret_cast<const Bf16*>(data_ + at_ * bytes_);
  }
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barriers_ + at_ * 16 + 8);
    advance();
  }
  /// Fills the first slot element by element, where the copy engine cannot: rows that do not begin at 16
  /// bytes.
  __device__ const Bf16* gather(const Tile& tile, const Split& s, int k) const {
    auto* const to = reinterpret_cast<Bf16*>(data_);
    __syncwarp();
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < kTileRows * s.chunk; i += 32) {
      const int row = i / s.chunk, element = k + (i % s.chunk ^ (swizzled(s.chunk) ? row % 8 * 8 : 0));
      const Rows& rows = tile.high.matrix && row >= 8 ? tile.high : tile.low;
      const int at = rows.first + (tile.high.matrix ? row % 8 : row);
      to[i] = element < s.total && at < rows.matrix->rows
                  ? rows.matrix->data[static_cast<int64_t>(at) * s.total + element]
                  : Bf16{0};
    }
    __syncwarp();
    return to;
  }

 private:
  static __device__ void copy(uint32_t to, const Rows& from, int k, uint32_t arrived) {
    ptx::cp_async_bulk_tensor(to, &from.matrix->map, k, from.first, arrived);
  }

  int slots_, bytes_, at_ = 0;
  uint32_t phase_ = 0, barriers_;
  char* data_;
};
constexpr int kBarrierBytes = kWarps * kMostSlots * 16;

/// acc += 16 rows x 16 elements of weights times 16 elements x 8 columns.
__device__ inline void multiply(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
  ptx::mma_m16n8k16(acc, a0, a1, a2, a3, b0, b1);
}

/// A lane's sums of a unit: (row, column 2 quarter), (row, 2 quarter + 1) and the same of row + 8. Two of
/// each, taken by turns.
struct Sums {
  float even[4] = {}, odd[4] = {};

  /// A slot times a column's elements (null: the lane's column is not in use); `left` of them are in the
  /// segment.
  __device__ void add(const Bf16* slot, int chunk, const uint4* column, int left, const Place& place) {
    constexpr int kSteps = kMostChunk / 32;
    const Bf16* const low = slot + place.row * chunk;
    const Bf16* const high = low + 8 * chunk;
    const int end = least(left, chunk), mine = end - place.quarter * 8;
    const int twist = swizzled(chunk) ? place.row * 8
                                      : 0;  // where the copy engine put a piece: rows of a line use all banks
    uint4 a[kSteps], b[kSteps], x[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      a[i] = b[i] = x[i] = make_uint4(0, 0, 0, 0);
      if (i * 32 >= mine) continue;
      const int piece = (i * 32 + place.quarter * 8) ^ twist;
      a[i] = *reinterpret_cast<const uint4*>(low + piece);
      b[i] = *reinterpret_cast<const uint4*>(high + piece);
      if (column) x[i] = column[i * 4];
    }
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      if (i * 32 >= end) continue;
      multiply(even, a[i].x, b[i].x, a[i].y, b[i].y, x[i].x, x[i].y);
      multiply(odd, a[i].z, b[i].z, a[i].w, b[i].w, x[i].z, x[i].w);
    }
  }
  __device__ void join() {
    for (int i = 0; i < 4; i++) even[i] += odd[i];
  }
};

/// Where the warps of a group lay their sums side by side: two turns of (segment, row, column).
class Exchange {
 public:
  __device__ Exchange(float* room, const Place& place, int segments)
      : room_(room + place.group * 2 * segments * kTileRows * kColumns), segments_(segments) {}

  /// All warps of the group hand in their sums; then at() may be called until the next give().
  __device__ void give(const Place& place, const float (&sums)[4]) {
    turn_ ^= 1;
    float* const to = room_ + (turn_ * segments_ + place.segment) * kTileRows * kColumns +
                      place.row * kColumns + 2 * place.quarter;
    *reinterpret_cast<float2*>(to) = make_float2(sums[0], sums[1]);
    *reinterpret_cast<float2*>(to + 8 * kColumns) = make_float2(sums[2], sums[3]);
    place.meet();
  }
  /// The tree over the segments; a segment's value of a token is the sum of its planes, the smallest first.
  template <bool Fast>
  __device__ float at(int row, int token, int planes) const {
    const float* from =
        room_ + turn_ * segments_ * kTileRows * kColumns + row * kColumns + token * (Fast ? 1 : planes);
    float leaf[kSegments];
#pragma unroll
    for (int s = 0; s < kSegments; s++) {
      leaf[s] = 0;
      if (s >= segments_) continue;
      leaf[s] = Fast || planes == 1 ? from[0] : (from[2] + from[1]) + from[0];
      from += kTileRows * kColumns;
    }
#pragma unroll
    for (int span = 1; span < kSegments; span *= 2)
      if (span < segments_)
#pragma unroll
        for (int i = 0; i < kSegments; i += 2 * span) leaf[i] += leaf[i + span];
    return leaf[0];
  }

 private:
  float* room_;
  int segments_, turn_ = 0;
};
constexpr int kExchangeBytes = 2 * kWarps * kTileRows * kColumns * static_cast<int>(sizeof(float));

/// Eight neighbours of a row as bfloat16, rounded.
__device__ inline uint4 pack(const float (&x)[8]) {
  uint32_t out[4];
#pragma unroll
  for (int j = 0; j < 4; j++) out[j] = ptx::cvt_rn_bf16x2(x[2 * j], x[2 * j + 1]);
  return make_uint4(out[0], out[1], out[2], out[3]);
}
/// The bfloat16 planes whose sum is x, to where column and element are; planes lie s.plane apart.
__device__ inline void put_planes(Bf16* columns, const Split& s, int row, int planes, int element, float x) {
  const int at = s.leaves ? element / s.length * s.padded + element % s.length : element;
  for (int p = 0; p < planes; p++) {
    const Bf16 plane = to_bf16(x);
    columns[(row * planes + p) * s.plane + at] = plane;
    x -= to_float(plane);
  }
}
__device__ inline void clear_columns(Bf16* columns, const Split& s, int count) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count * s.plane / 8; i += kThreads)
    reinterpret_cast<uint4*>(columns)[i] = make_uint4(0, 0, 0, 0);
  sync_block();
}

/// Puts `count` rows of s.total activations into shared memory as columns, `planes` each. All threads call
/// it. Fast: one plane, and all pieces aligned.
template <bool Fast>
__device__ void load_columns(Bf16* columns, const Split& s, int count, int planes, const float* rows) {
  if constexpr (Fast) {
    // A thread takes the same piece of every row, or of every `together`th where rows are short.
    const int pieces = s.total / 8, shift = pieces <= 64 ? 3 : pieces <= 128 ? 2 : pieces <= 256 ? 1 : 0;
    const int lanes = kThreads >> shift, row0 = threadIdx.x / lanes;
#pragma unroll 1
    for (int piece = threadIdx.x % lanes; piece < pieces; piece += lanes) {
      const float* from = rows + static_cast<int64_t>(row0) * s.total + piece * 8;
      uint4* to = reinterpret_cast<uint4*>(columns + row0 * s.plane) + piece;
#pragma unroll 4
      for (int row = row0; row < count; row += 1 << shift) {
        float x[8];
        eight(from, x);
        *to = pack(x);
        from += s.total << shift;
        to += (s.plane << shift) / 8;
      }
    }
  } else {
    clear_columns(columns, s, count * planes);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * s.total; i += kThreads)
      put_planes(columns, s, i / s.total, planes, i % s.total, rows[i]);
  }
}

/// The lane's own column of `columns`, at its segment and quarter; null when the lane's column is not in use.
__device__ inline const uint4* column_of(const Bf16* columns, const Split& s, const Place& place, int used) {
  if (place.row >= used) return nullptr;
  return reinterpret_cast<const uint4*>(columns + place.row * s.plane + place.segment * s.padded) +
         place.quarter;
}

/// Columns of up to kColumns rows after their RMSNorm. index null: row r is row r. `room`: 4 * kWarps floats.
template <bool Fast>
__device__ void load_normed_columns(Bf16* columns, float* room, const Split& s, int count, int planes,
                                    float eps, const float* hidden, const int* index, const Bf16* weight) {
  const int n = s.total;
  const auto row_of = [&](int r) { return hidden + static_cast<int64_t>(index ? index[r] : r) * n; };
  if constexpr (Fast) {
    // A thread has one piece of a row, in registers, of four rows at a time.
    constexpr int kTogether = 4;
    const int i = threadIdx.x * 8;
    float w[8] = {};
    if (i < n) eight(weight + i, w);
#pragma unroll 1
    for (int first = 0; first < count; first += kTogether) {
      float x[kTogether][8], squares[kTogether] = {};
#pragma unroll
      for (int r = 0; r < kTogether; r++)
        if (i < n && first + r < count) eight(row_of(first + r) + i, x[r]);
#pragma unroll
      for (int r = 0; r < kTogether; r++)
        if (i < n && first + r < count)
#pragma unroll
          for (int j = 0; j < 8; j++) squares[r] = fused(x[r][j], x[r][j], squares[r]);
      block_sums(squares, room);
#pragma unroll
      for (int r = 0; r < kTogether; r++) {
        if (i >= n || first + r >= count) continue;
        const float inverse = inverse_rms(squares[r], n, eps);
#pragma unroll
        for (int j = 0; j < 8; j++) x[r][j] = x[r][j] * inverse * w[j];
        *reinterpret_cast<uint4*>(columns + (first + r) * s.plane + i) = pack(x[r]);
      }
    }
  } else {
    clear_columns(columns, s, count * planes);
#pragma unroll 1
    for (int r = 0; r < count; r++) {
      const float* const row = row_of(r);
      float squares[1] = {0};
#pragma unroll 1
      for (int i = threadIdx.x; i < n; i += kThreads) squares[0] = fused(row[i], row[i], squares[0]);
      block_sums(squares, room);
      const float inverse = inverse_rms(squares[0], n, eps);
#pragma unroll 1
      for (int i = threadIdx.x; i < n; i += kThreads)
        put_planes(columns, s, r, planes, i, round_to(planes == 1, row[i] * inverse * to_float(weight[i])));
    }
  }
}
/// Rows that the fast form takes.
constexpr int kMostNormed = 8 * kThreads;

constexpr int kFillers = 4;  // warps that keep the rings filled
constexpr int kGemvThreads = kThreads + kFillers * 32;

/// A matrix op is a Work<Fast>: made from its Parameters, a warp's place and shared memory, it says which
/// weights the warp's group multiplies, loads the columns, and takes the sums. In this order, where `all` is
/// the 16 warps and those that fill:
///   early()   the 16 warps: what can be done before the inputs are there
///   known()   all: tiles known then
///   list()    the 16 warps: with the inputs there, what it takes to know the others
///   tiles()   all: all tiles, of parts() units each; rows(): a unit's weights
///   load()    the 16 warps: the columns
///   enter()   the 16 warps: goes to a unit; column(): the lane's column there
///   finish()  the 16 warps: the sums of the unit
/// Fast is for bfloat16 runs with aligned rows. Code that has not run lately comes from memory too, and
/// slowly: what every step runs is kept short, and the rest is in a kernel of its own.
template <template <bool> class WorkOf, bool Fast>
__global__ void __launch_bounds__(kGemvThreads, 1)
    gemv(const __grid_constant__ typename WorkOf<Fast>::Parameters p, int slots) {
  using Work = WorkOf<Fast>;
  TP_DYNAMIC_SHARED(char, shared, 1024);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool fills = warp >= kWarps;
  // Lane i of filling warp j stands for warp j + kFillers * i.
  const int filled = warp - kWarps + kFillers * lane;
  const bool asks = fills && filled < kWarps;
  const Place place(p.segments(), fills ? filled % kWarps : warp, fills ? 0 : lane);
  Ring ring(shared, place.warp, slots, p.slot_bytes());
  auto* const exchange = reinterpret_cast<float*>(shared + kBarrierBytes + kWarps * slots * p.slot_bytes());
  Work work(p, place, exchange, reinterpret_cast<char*>(exchange) + kExchangeBytes);
  if (asks) ring.prepare();
  if (!fills) work.early();
  __syncthreads();
  const Split& s = work.split();
  if (fills) {
    // All segments have the same number of slots in a tile, so no lane waits for what another one holds back.
    if (!Fast && !s.aligned) return;
    Cursor at;
#pragma unroll 1
    for (int round = 0; round < 2; round++) {
      const int tiles = round == 0 ? work.known() : work.tiles();
      if (asks)
#pragma unroll 1
        for (; at.tile < tiles; at.advance(work.parts())) {
          const Tile tile = work.rows(at);
          int k = s.from(place.segment, 0);
#pragma unroll 1
          for (int c = 0; c < s.chunks; c++, k += s.step) ring.ask(tile, k, s.slot_bytes());
        }
      __syncwarp();
      if (work.all_known()) return;
      if (round == 0) ptx::bar_sync<kListed, kGemvThreads>();
    }
    return;
  }
  wait_for_inputs();
  let_next_start();
  work.list();
  if ((Fast || s.aligned) && !work.all_known()) ptx::bar_arrive<kListed, kGemvThreads>();
  work.load();
  sync_block();
  const int tiles = work.tiles(), parts = work.parts();
#pragma unroll 1
  for (Cursor at; at.tile < tiles; at.advance(parts)) {
    work.enter(at);
    const uint4* column = work.column();
    Sums sums;
    int left = s.size(place.segment);
#pragma unroll 1
    for (int c = 0; c < s.chunks; c++, left -= s.step) {
      if (Fast || s.aligned) {
        sums.add(ring.take(), s.chunk, column, left, place);
        ring.release();
      } else {
        sums.add(ring.gather(work.rows(at), s, s.from(place.segment, c)), s.chunk, column, left, place);
      }
      if (column) column += s.step / 8;
    }
    sums.join();
    work.finish(at, sums.even);
  }
}

/// Launches a matrix op for `tokens` tokens, in chunks that fit the columns and the shared memory.
/// p.bytes(): shared memory of the Work for p.columns.
template <template <bool> class WorkOf>
void launch_gemv(CudaBackend& backend, const Dims& d, int tokens, typename WorkOf<true>::Parameters p) {
  const auto slots = [&](int count) {
    p.columns.tokens = count;
    const int room =
        backend.shared_memory() - 2048 - p.bytes() - kExchangeBytes - kBarrierBytes;  // 2 KB: a kernel's own
    return room < 0 ? 0 : least(kMostSlots, least(room, backend.ring_bytes) / (kWarps * p.slot_bytes()));
  };
  p.columns = {0, 0, d.bfloat16 ? 1 : 3};
  int most = least(kColumns / p.columns.planes, tokens);
  while (most > 1 && slots(most) < 2) most--;
  if (slots(most) < 1)
    fail("TP_LIMIT",
         "the activations of one token need %d bytes of shared memory in one op, the GPU gives %d",
         p.bytes() + kExchangeBytes + kBarrierBytes + kWarps * p.slot_bytes(), backend.shared_memory());
  const bool fast = d.bfloat16 && p.aligned();
  for (int first = 0; first < tokens; first += most) {
    const int count = slots(least(tokens - first, most));
    p.columns.first = first;
    backend.launch(fast ? gemv<WorkOf, true> : gemv<WorkOf, false>,
                   dim3(static_cast<unsigned>(backend.processors())), kGemvThreads,
                   p.bytes() + kExchangeBytes + kBarrierBytes + kWarps * count * p.slot_bytes(), p, count);
  }
}

}  // namespace tp::cuda
