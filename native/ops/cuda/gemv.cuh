// Weight rows times a few columns of activations: the inner loop of every matrix op.
//
// A block of 16 warps stays on its multiprocessor and streams tiles of 16 weight rows through shared memory.
// The columns (K) of a row are cut into segments, a warp takes one segment of a tile, and the warps of a tile
// form a group: for sums that tensor parallelism splits a segment is a leaf, so one warp sums one leaf in an
// order that depends on its length alone; else there are 8 segments. Segments meet in tree order.
//
// Products are tensor-core products of bfloat16 with fp32 sums, up to 8 columns at once: one token is one
// column, or in float32 runs three, because an fp32 value is exactly the sum of three bfloat16 planes. What a
// column holds never changes what its neighbours compute, so a token's bits do not depend on the batch.
//
// Every warp has a ring of slots of its own, filled by the copy engine: boxes of 8 rows by `chunk` elements.
// The copies run as far ahead as there is room, without a barrier between warps, and start before the
// kernel's inputs are there.
#pragma once

#include <climits>

#include "ops/cuda/block.cuh"
#include "ops/cuda/matrix.h"

namespace tp::cuda {

constexpr int kTileRows = 16;
constexpr int kColumns = 8;
constexpr int kSegments = 8;  // of a row that tensor parallelism does not split
constexpr int kUnit = 64;     // such segments are whole multiples of it: one cache line
constexpr int kMostChunk = 96, kMostSlots = 16;

/// How rows of `total` elements are cut.
struct Split {
  int total;     // elements of a row
  int segments;  // warps of a group; a power of two
  int length;    // elements of a segment
  int longer;    // this many first segments have kUnit elements more
  int padded;    // room of a segment in shared memory: a multiple of 8
  int plane;  // room of a column in shared memory; 64 bytes past a multiple of 128, so that columns use other
              // banks
  int chunk;  // elements of a row that one copy brings
  bool aligned;  // every piece of 8 elements begins at a multiple of 16 bytes

  __host__ __device__ int start(int segment) const {
    return segment * length + min_of(segment, longer) * kUnit;
  }
  __host__ __device__ int size(int segment) const {
    const int left = total - start(segment), size = length + (segment < longer ? kUnit : 0);
    return left < 0 ? 0 : min_of(left, size);
  }
  /// Where a segment's activations lie in shared memory.
  __host__ __device__ int place(int segment) const {
    return segment * padded + min_of(segment, longer) * kUnit;
  }
  __host__ __device__ int slot_bytes() const { return kTileRows * chunk * static_cast<int>(sizeof(Bf16)); }
  static __host__ __device__ int min_of(int a, int b) { return a < b ? a : b; }
};

inline Split split_of(int total, int segments, int length, int longer) {
  Split s{};
  s.total = total;
  s.segments = segments;
  s.length = length;
  s.longer = longer;
  s.padded = (length + 7) / 8 * 8;
  s.plane = (segments * s.padded + longer * kUnit + 63) / 64 * 64 + kMostChunk;
  s.plane += (96 - s.plane % 64) % 64;
  s.aligned = total % 8 == 0 && length % 8 == 0;
  s.chunk = 64;
  for (int chunk = kMostChunk; chunk > 32 && length % 64 != 0; chunk -= 8)
    if (s.padded % chunk == 0) {
      s.chunk = chunk;
      break;
    }
  return s;
}
inline Split split_whole(int total) {
  const int units = (total + kUnit - 1) / kUnit;
  return split_of(total, kSegments, units / kSegments * kUnit, units % kSegments);
}
inline Split split_leaves(int total, int leaves) { return split_of(total, leaves, total / leaves, 0); }

inline Matrix matrix_of(const Bf16* data, int64_t rows, const Split& s) {
  return matrix_of(data, rows, s.total, s.chunk, s.aligned);
}

/// Tokens as columns.
struct Columns {
  int first;   // first token
  int tokens;  // tokens in this launch
  int planes;  // columns of a token: 1, or 3 in float32 runs
};

/// A warp's place. Warp w is segment w % segments of group w / segments of the block.
struct Place {
  int lane, row, quarter;    // of a tile: rows `row` and `row + 8`, elements 8 * quarter .. of every 32
  int segment, group;        // in the block
  int groups, global_group;  // in the grid
  int thread;                // in the group
  int threads;               // of the group

  __device__ explicit Place(int segments) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    row = lane / 4;
    quarter = lane % 4;
    segment = warp % segments;
    group = warp / segments;
    groups = gridDim.x * (kWarps / segments);
    global_group = group * gridDim.x + blockIdx.x;
    threads = segments * 32;
    thread = threadIdx.x % threads;
  }
  __device__ void meet() const {
    if (threads == 32)
      __syncwarp();
    else
      asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory");
  }
  /// How many of `tiles` tiles this group takes: its own number, then every `step`th.
  __device__ int share(int tiles) const {
    return tiles <= global_group ? 0 : (tiles - global_group + groups - 1) / groups;
  }
};

/// Eight neighbouring rows of a matrix; the upper or the lower half of a tile.
struct Half {
  const Matrix* matrix;
  int row;
};

/// Where a walk through the units of a group stands: a tile, and of an expert tile the expert.
struct Cursor {
  int tile = 0, part = 0;
  __device__ void advance(int parts) {
    if (++part == parts) part = 0, tile++;
  }
};

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// The warp's ring of weights. fill() and push() ask for the next pieces, pop() waits for the oldest.
class Ring {
 public:
  /// `memory`: kMostSlots arrival counters for every warp, then all warps' slots.
  __device__ Ring(char* memory, const Place& place, int slots)
      : arrivals_(shared_address(memory) + threadIdx.x / 32 * kMostSlots * 8),
        slots_(slots),
        memory_(memory) {
    if (place.lane == 0) {
      for (int i = 0; i < slots; i++)
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(arrivals_ + i * 8) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
  }

  /// Asks for pieces until the ring is full or the first `tiles` tiles are all asked for.
  template <class Work>
  __device__ void fill(const Work& work, const Place& place, int tiles) {
    while (waiting_ < slots_ && next_.tile < tiles) push(work, place, tiles);
  }
  template <class Work>
  __device__ void push(const Work& work, const Place& place, int tiles) {
    if (next_.tile >= tiles) return;
    const Split& s = work.split();
    const int bytes = s.slot_bytes(), from = s.start(place.segment) + offset_;
    char* const slot = slot_at(in_, bytes);
    if (s.aligned) {
      if (place.lane == 0) {
        const Half low = work.low(next_), high = work.high(next_);
        const uint32_t arrival = arrivals_ + in_ * 8;
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(arrival), "r"(bytes)
                     : "memory");
        copy(slot, low, from, arrival);
        copy(slot + bytes / 2, high, from, arrival);
      }
    } else {
      const Half low = work.low(next_), high = work.high(next_);
      auto* const to = reinterpret_cast<Bf16*>(slot);
      for (int i = place.lane; i < kTileRows * s.chunk; i += 32) {
        const int row = i / s.chunk, k = from + i % s.chunk;
        const Half& half = row < 8 ? low : high;
        const int at = half.row + row % 8;
        to[i] = k < s.total && at < half.matrix->rows
                    ? half.matrix->data[static_cast<int64_t>(at) * s.total + k]
                    : Bf16{0};
      }
    }
    in_ = in_ + 1 == slots_ ? 0 : in_ + 1;
    waiting_++;
    offset_ += s.chunk;
    if (offset_ < s.size(place.segment)) return;
    offset_ = 0;
    next_.advance(work.parts());
  }
  /// The oldest piece, 16 rows by `chunk`. The warp gives it back by release() when all lanes have read.
  __device__ const Bf16* pop(const Split& s) {
    if (s.aligned) {
      const uint32_t arrival = arrivals_ + out_ * 8;
      uint32_t here = 0;
      for (int tries = 0; !here; tries++) {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(here)
            : "r"(arrival), "r"(phase_)
            : "memory");
        if (tries > (1 << 24)) __trap();  // seconds: the copy never comes
      }
    } else {
      __syncwarp();
    }
    return reinterpret_cast<const Bf16*>(slot_at(out_, s.slot_bytes()));
  }
  __device__ void release() {
    __syncwarp();
    if (++out_ == slots_) out_ = 0, phase_ ^= 1;
    waiting_--;
  }

 private:
  __device__ char* slot_at(int slot, int bytes) const {
    return memory_ + kWarps * kMostSlots * 8 + (threadIdx.x / 32 * slots_ + slot) * bytes;
  }
  static __device__ void copy(char* to, const Half& from, int k, uint32_t arrival) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(to)),
        "l"(&from.matrix->map), "r"(k), "r"(from.row), "r"(arrival)
        : "memory");
  }

  Cursor next_;
  uint32_t arrivals_, phase_ = 0;
  int slots_, in_ = 0, out_ = 0, waiting_ = 0, offset_ = 0;
  char* memory_;
};
constexpr int kArrivalBytes = kWarps * kMostSlots * 8;

/// acc += 16 rows x 16 elements of weights times 16 elements x 8 columns.
__device__ inline void multiply(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// acc += one slot of weights times a column's elements; `left` of them are in the segment.
__device__ inline void multiply_slot(float (&even)[4], float (&odd)[4], const Bf16* slot, int chunk,
                                     const uint4* column, int left, const Place& place) {
  const Bf16* const low = slot + place.row * chunk + place.quarter * 8;
  const Bf16* const high = low + 8 * chunk;
  for (int k = 0; k < chunk; k += 32) {
    uint4 a = {0, 0, 0, 0}, b = {0, 0, 0, 0}, x = {0, 0, 0, 0};
    if (k + place.quarter * 8 < min(left, chunk)) {
      a = *reinterpret_cast<const uint4*>(low + k);
      b = *reinterpret_cast<const uint4*>(high + k);
      if (column) x = column[k / 8];
    }
    multiply(even, a.x, b.x, a.y, b.y, x.x, x.y);
    multiply(odd, a.z, b.z, a.w, b.w, x.z, x.w);
  }
}

/// Multiplies every unit of `work` and hands it the 4 sums of this lane: (row, column 2 quarter), (row, 2
/// quarter + 1) and the same of row + 8. A unit is one tile, or one expert's part of a tile.
template <class Work>
__device__ void multiply_all(Ring& ring, Work& work, const Place& place) {
  const int tiles = work.tiles();
  ring.fill(work, place, tiles);
  const Split& s = work.split();
  const int size = s.size(place.segment);
  for (Cursor at; at.tile < tiles; at.advance(work.parts())) {
    const uint4* column = work.column(at);
    float even[4] = {}, odd[4] = {};
    for (int k = 0; k == 0 || k < size; k += s.chunk) {
      const Bf16* const slot = ring.pop(s);
      multiply_slot(even, odd, slot, s.chunk, column, size - k, place);
      ring.release();
      ring.push(work, place, tiles);
      if (column) column += s.chunk / 8;
    }
    for (int i = 0; i < 4; i++) even[i] += odd[i];
    work.finish(at, even);
  }
}

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
  __device__ float at(int row, int token, int planes) const {
    const float* from = room_ + turn_ * segments_ * kTileRows * kColumns + row * kColumns + token * planes;
    float leaf[kSegments];
#pragma unroll
    for (int s = 0; s < kSegments; s++) {
      leaf[s] = 0;
      if (s >= segments_) continue;
      leaf[s] = planes == 1 ? from[0] : (from[2] + from[1]) + from[0];
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

/// Activations as they lie in memory: rows of fp32, `stride` apart.
struct Plain {
  const float* rows;
  int64_t stride;
  __device__ float one(int row, int i) const { return rows[row * stride + i]; }
  __device__ void eight(int row, int i, float (&x)[8]) const {
    const auto* const from = reinterpret_cast<const float4*>(rows + row * stride + i);
    const float4 a = from[0], b = from[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  }
};

/// The bfloat16 planes whose sum is x: one that x is rounded to, or three that hold every bit.
__device__ inline void planes_of(float x, int planes, Bf16 (&plane)[3]) {
  for (int p = 0; p < 3; p++) {
    plane[p] = p < planes ? to_bf16(x) : Bf16{0};
    x -= to_float(plane[p]);
  }
}

/// Puts `rows` rows of s.total activations into shared memory as columns, `planes` each. All threads call it.
template <class Source>
__device__ void load_columns(Bf16* columns, const Split& s, int rows, int planes, const Source& source) {
  if (!s.aligned) {
    auto* const words = reinterpret_cast<uint4*>(columns);
    for (int i = threadIdx.x; i < rows * planes * s.plane / 8; i += kThreads)
      words[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (int i = threadIdx.x; i < rows * s.total; i += kThreads) {
      const int row = i / s.total, element = i % s.total;
      Bf16 plane[3];
      planes_of(source.one(row, element), planes, plane);
      int segment = 0;
      while (segment + 1 < s.segments && element >= s.start(segment + 1)) segment++;
      const int at = s.place(segment) + element - s.start(segment);
      for (int p = 0; p < planes; p++) columns[(row * planes + p) * s.plane + at] = plane[p];
    }
    return;
  }
  // Whole pieces of 8; the room behind the last element is read too and must be finite.
  const int pieces = s.plane / 8;
  for (int i = threadIdx.x; i < rows * pieces; i += kThreads) {
    const int row = i / pieces, piece = i % pieces;
    union {
      Bf16 element[8];
      uint4 all;
    } out[3] = {};
    if (8 * piece < s.total) {
      float x[8];
      source.eight(row, 8 * piece, x);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        Bf16 plane[3];
        planes_of(x[j], planes, plane);
        for (int p = 0; p < 3; p++) out[p].element[j] = plane[p];
      }
    }
    for (int p = 0; p < 3; p++)
      if (p < planes) reinterpret_cast<uint4*>(columns + (row * planes + p) * s.plane)[piece] = out[p].all;
  }
}

/// The lane's own column of `columns`, at its quarter; null when the lane's column is not in use.
__device__ inline const uint4* column_of(const Bf16* columns, const Split& s, const Place& place, int used) {
  if (place.row >= used) return nullptr;
  return reinterpret_cast<const uint4*>(columns + place.row * s.plane + s.place(place.segment)) +
         place.quarter;
}

/// Rows on their way through an RMSNorm. `index` null: row r is row r.
struct Normed {
  const float* rows;
  const int* index;
  const Bf16* weight;
  int n;
  bool bfloat16;
  const float* inverse;  // (rows) in shared memory

  __device__ const float* row(int r) const { return rows + static_cast<int64_t>(index ? index[r] : r) * n; }
  __device__ float one(int r, int i) const {
    return round_to(bfloat16, row(r)[i] * inverse[r] * to_float(weight[i]));
  }
  __device__ void eight(int r, int i, float (&x)[8]) const {
    Plain{row(r), 0}.eight(0, i, x);
    const uint4 w = *reinterpret_cast<const uint4*>(weight + i);
    const uint32_t pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 8; j++)
      x[j] = round_to(bfloat16,
                      x[j] * inverse[r] * float_of(j % 2 ? pairs[j / 2] & 0xffff0000u : pairs[j / 2] << 16));
  }
};

/// Columns of up to kColumns rows after their RMSNorm.
__device__ inline void load_normed_columns(Bf16* columns, float* room, const Split& s, int rows, int planes,
                                           float eps, Normed source) {
  float squares[kColumns];
#pragma unroll
  for (int r = 0; r < kColumns; r++) {
    squares[r] = 0;
    if (r >= rows) continue;
    const float* const row = source.row(r);
    for (int i = threadIdx.x; i < s.total; i += kThreads) squares[r] = fused(row[i], row[i], squares[r]);
  }
  block_sums(squares, room);
  __shared__ float inverse[kColumns];
  if (threadIdx.x == 0)
#pragma unroll
    for (int r = 0; r < kColumns; r++) inverse[r] = inverse_rms(squares[r], s.total, eps);
  __syncthreads();
  source.inverse = inverse;
  load_columns(columns, s, rows, planes, source);
}

/// A matrix op is a Work: made from its Parameters, this warp's place and shared memory, it says which
/// weights its group multiplies (known() tiles of them before the inputs are there), loads the columns, and
/// takes the sums.
template <class Work>
__global__ void __launch_bounds__(kThreads, 1)
    gemv(const __grid_constant__ typename Work::Parameters p, int slots) {
  extern __shared__ __align__(128) char shared[];
  const Place place(p.segments());
  auto* const exchange = reinterpret_cast<float*>(shared + kArrivalBytes + kWarps * slots * p.slot_bytes());
  Ring ring(shared, place, slots);
  Work work(p, place, exchange, reinterpret_cast<char*>(exchange) + kExchangeBytes);
  ring.fill(work, place, work.known());
  wait_for_inputs();
  let_next_start();
  work.load();
  __syncthreads();
  multiply_all(ring, work, place);
}

/// Launches a matrix op for `tokens` tokens, in chunks that fit the columns and the shared memory.
/// p.bytes(): shared memory of the Work for p.columns.
template <class Work>
void launch_gemv(CudaBackend& backend, const Dims& d, int tokens, typename Work::Parameters p) {
  const auto slots = [&](int count) {
    p.columns.tokens = count;
    const int room =
        backend.shared_memory() - 1024 - p.bytes() - kExchangeBytes - kArrivalBytes;  // 1 KB: a kernel's own
    return room < 0 ? 0 : Split::min_of(kMostSlots, room / (kWarps * p.slot_bytes()));
  };
  p.columns = {0, 0, d.bfloat16 ? 1 : 3};
  int most = kColumns / p.columns.planes < tokens ? kColumns / p.columns.planes : tokens;
  while (most > 1 && slots(most) < 2) most--;
  if (slots(most) < 1)
    fail("TP_LIMIT",
         "the activations of one token need %d bytes of shared memory in one op, the GPU gives %d",
         p.bytes() + kExchangeBytes + kArrivalBytes + kWarps * p.slot_bytes(), backend.shared_memory());
  for (int first = 0; first < tokens; first += most) {
    const int count = slots(tokens - first < most ? tokens - first : most);
    p.columns.first = first;
    backend.launch(gemv<Work>, dim3(static_cast<unsigned>(backend.processors())), kThreads,
                   p.bytes() + kExchangeBytes + kArrivalBytes + kWarps * count * p.slot_bytes(), p, count);
  }
}

}  // namespace tp::cuda
