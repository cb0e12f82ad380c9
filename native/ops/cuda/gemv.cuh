// Weight rows times a few columns of activations: the inner loop of every matrix op.
//
// A block of 16 warps stays on its multiprocessor and streams tiles of 16 weight rows through shared memory. The
// columns (K) of a row are cut into segments, a warp takes one segment of a tile, and the warps of a tile form a group:
// for sums that tensor parallelism splits a segment is a leaf, so one warp sums one leaf in an order that depends on its
// length alone; else there are 8 segments. Segments meet in tree order.
//
// Products are tensor-core products of bfloat16 with fp32 sums, up to 8 columns at once: one token is one column, or in
// float32 runs three, because an fp32 value is exactly the sum of three bfloat16 planes. What a column holds never
// changes what its neighbours compute, so a token's bits do not depend on the batch.
//
// Every lane keeps a queue of its own 16-byte pieces of weights in shared memory and reads only what it asked for itself:
// the copies run many tiles ahead without a barrier, and start before the kernel's inputs are there.
#pragma once

#include <climits>

#include "ops/cuda/block.cuh"

namespace tp::cuda {

constexpr int kTileRows = 16;
constexpr int kColumns = 8;
constexpr int kSegments = 8;  // of a row that tensor parallelism does not split
constexpr int kDeep = 8, kShallow = 4;  // queue entries a lane

/// How rows of `total` elements are cut.
struct Split {
  int total;     // elements of a row
  int segments;  // warps of a group; a power of two
  int length;    // elements of a segment; the last ones may be shorter or empty
  int padded;    // room of a segment in shared memory: a multiple of 8
  int plane;     // room of a column in shared memory; 64 bytes past a multiple of 128, so that columns use other banks
  bool aligned;  // every piece is 16 bytes at a multiple of 16
};

inline Split split_of(int total, int segments, int length) {
  Split s{};
  s.total = total;
  s.segments = segments;
  s.length = length;
  s.padded = (length + 7) / 8 * 8;
  s.plane = (segments * s.padded + 63) / 64 * 64 + 32;
  s.aligned = total % 8 == 0 && length % 8 == 0;
  return s;
}
inline Split split_whole(int total) { return split_of(total, kSegments, ((total + kSegments - 1) / kSegments + 7) / 8 * 8); }
inline Split split_leaves(int total, int leaves) { return split_of(total, leaves, total / leaves); }

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
  __device__ int share(int tiles) const { return tiles <= global_group ? 0 : (tiles - global_group + groups - 1) / groups; }
};

/// One warp's part of a stretch of weights: two rows of the tile a lane, from this segment's first element on.
struct Rows {
  const Bf16* low;
  const Bf16* high;
  int length;  // elements of the segment
  bool aligned;
};

__device__ inline int segment_length(const Split& s, int segment) {
  const int left = s.total - segment * s.length;
  return left < 0 ? 0 : (left < s.length ? left : s.length);
}

/// Rows first + row and first + row + 8 of a matrix of `count` rows; rows that are not there repeat the last one.
__device__ inline Rows rows_of(const Bf16* weight, const Split& s, const Place& place, int first, int count) {
  const int low = min(first + place.row, count - 1), high = min(first + place.row + 8, count - 1);
  const int64_t from = static_cast<int64_t>(place.segment) * s.length;
  return {weight + static_cast<int64_t>(low) * s.total + from, weight + static_cast<int64_t>(high) * s.total + from,
          segment_length(s, place.segment), s.aligned};
}

/// Asks for 8 elements at `from`; those past `valid` become zero.
__device__ inline void fetch(uint4* to, const Rows& rows, const Bf16* from, int valid) {
  if (rows.aligned) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(valid > 0 ? from : rows.low),
                 "r"(valid * 2)
                 : "memory");
    return;
  }
  auto* const elements = reinterpret_cast<Bf16*>(to);
  for (int i = 0; i < 8; i++) elements[i] = i < valid ? from[i] : Bf16{0};
}

/// The lane's queue of weights. push() asks for the next piece, pop() waits for the oldest.
template <int Depth>
class Queue {
 public:
  __device__ Queue(uint4* room, const Place& place)
      : slots_(room + (threadIdx.x / 32) * Depth * 64 + place.lane), quarter_(place.quarter) {}

  /// Asks for pieces until the queue is full or `units` are all asked for.
  template <class Work>
  __device__ void fill(const Work& work, int units) {
    while (waiting_ < Depth && unit_ < units) push(work, units);
  }
  /// The same, with empty entries when there is too little: how many copies are in flight says which have arrived.
  template <class Work>
  __device__ void fill_up(const Work& work, int units) {
    while (waiting_ < Depth) push(work, units);
  }
  template <class Work>
  __device__ void push(const Work& work, int units) {
    if (unit_ < units) {
      if (step_ == 0) rows_ = work.rows(unit_);
      uint4* const slot = slots_ + in_ * 64;
      const int k = step_ * 32 + quarter_ * 8;
      const int valid = max(0, min(8, rows_.length - k));
      fetch(slot, rows_, rows_.low + k, valid);
      fetch(slot + 32, rows_, rows_.high + k, valid);
      if (++step_ * 32 >= rows_.length) step_ = 0, unit_++;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    in_ = in_ + 1 == Depth ? 0 : in_ + 1;
    waiting_++;
  }
  __device__ void pop(uint4& low, uint4& high) {
    asm volatile("cp.async.wait_group %0;" ::"n"(Depth - 1) : "memory");
    low = slots_[out_ * 64];
    high = slots_[out_ * 64 + 32];
    out_ = out_ + 1 == Depth ? 0 : out_ + 1;
    waiting_--;
  }

 private:
  uint4* slots_;
  Rows rows_{};
  int quarter_, unit_ = 0, step_ = 0, in_ = 0, out_ = 0, waiting_ = 0;
};

/// acc += 16 rows x 16 elements of weights times 16 elements x 8 columns.
__device__ inline void multiply(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// Multiplies every unit of `work` and hands it the 4 sums of this lane: (row, column 2 quarter), (row, 2 quarter + 1) and
/// the same of row + 8. A unit is what rows() describes: one tile, or one expert's part of a tile.
template <int Depth, class Work>
__device__ void multiply_all(Queue<Depth>& queue, Work& work, const Place& place) {
  const int units = work.units();
  queue.fill_up(work, units);
  for (int unit = 0; unit < units; unit++) {
    const uint4* const column = work.column(unit);
    const int length = work.length(unit);
    float even[4] = {}, odd[4] = {};
    for (int k = 0; k == 0 || k < length; k += 32) {
      uint4 low, high, x = {0, 0, 0, 0};
      queue.pop(low, high);
      if (column) x = column[k / 8];
      multiply(even, low.x, high.x, low.y, high.y, x.x, x.y);
      multiply(odd, low.z, high.z, low.w, high.w, x.z, x.w);
      queue.push(work, units);
    }
    for (int i = 0; i < 4; i++) even[i] += odd[i];
    work.finish(unit, even);
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
    float* const to = room_ + (turn_ * segments_ + place.segment) * kTileRows * kColumns + place.row * kColumns + 2 * place.quarter;
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

template <int Depth>
constexpr int queue_bytes() {
  return kWarps * Depth * 64 * static_cast<int>(sizeof(uint4));
}

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
  if (!s.aligned || s.segments * s.length != s.total) {
    auto* const words = reinterpret_cast<uint4*>(columns);
    for (int i = threadIdx.x; i < rows * planes * s.plane / 8; i += kThreads) words[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (int i = threadIdx.x; i < rows * s.total; i += kThreads) {
      const int row = i / s.total, element = i % s.total;
      Bf16 plane[3];
      planes_of(source.one(row, element), planes, plane);
      const int at = element / s.length * s.padded + element % s.length;
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
  return reinterpret_cast<const uint4*>(columns + place.row * s.plane + place.segment * s.padded) + place.quarter;
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
  __device__ float one(int r, int i) const { return round_to(bfloat16, row(r)[i] * inverse[r] * to_float(weight[i])); }
  __device__ void eight(int r, int i, float (&x)[8]) const {
    Plain{row(r), 0}.eight(0, i, x);
    const uint4 w = *reinterpret_cast<const uint4*>(weight + i);
    const uint32_t pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 8; j++)
      x[j] = round_to(bfloat16, x[j] * inverse[r] * float_of(j % 2 ? pairs[j / 2] & 0xffff0000u : pairs[j / 2] << 16));
  }
};

/// Columns of up to kColumns rows after their RMSNorm.
__device__ inline void load_normed_columns(Bf16* columns, float* room, const Split& s, int rows, int planes, float eps,
                                           Normed source) {
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

/// A matrix op is a Work: made from its Parameters, this warp's place and shared memory, it says which weights its group
/// multiplies (known() of them before the inputs are there), loads the columns, and takes the sums.
template <class Work, int Depth>
__global__ void __launch_bounds__(kThreads, 1) gemv(const __grid_constant__ typename Work::Parameters p) {
  extern __shared__ uint4 shared[];
  const Place place(p.segments());
  auto* const exchange = reinterpret_cast<float*>(shared + kWarps * Depth * 64);
  Work work(p, place, exchange, reinterpret_cast<char*>(exchange) + kExchangeBytes);
  Queue<Depth> queue(shared, place);
  queue.fill(work, work.known());
  wait_for_inputs();
  let_next_start();
  work.load();
  __syncthreads();
  multiply_all(queue, work, place);
}

/// Launches a matrix op for `tokens` tokens, in chunks that fit the columns and the shared memory.
/// p.bytes(): shared memory of the Work for p.columns.
template <class Work>
void launch_gemv(CudaBackend& backend, const Dims& d, int tokens, typename Work::Parameters p) {
  const auto fits = [&](int count, int queue) {
    p.columns.tokens = count;
    return p.bytes() + queue + kExchangeBytes <= backend.shared_memory();
  };
  p.columns = {0, 0, d.bfloat16 ? 1 : 3};
  int most = kColumns / p.columns.planes < tokens ? kColumns / p.columns.planes : tokens;
  while (most > 1 && !fits(most, queue_bytes<kShallow>())) most--;
  if (!fits(most, queue_bytes<kShallow>()))
    fail("TP_CUDA", "the activations of one token need %d bytes of shared memory in one op, the device gives %d",
         p.bytes() + queue_bytes<kShallow>() + kExchangeBytes, backend.shared_memory());
  for (int first = 0; first < tokens; first += most) {
    p.columns.first = first;
    const int count = tokens - first < most ? tokens - first : most;
    const dim3 grid(static_cast<unsigned>(backend.processors()));
    if (fits(count, queue_bytes<kDeep>()))
      backend.launch(gemv<Work, kDeep>, grid, kThreads, p.bytes() + kExchangeBytes + queue_bytes<kDeep>(), p);
    else
      backend.launch(gemv<Work, kShallow>, grid, kThreads, p.bytes() + kExchangeBytes + queue_bytes<kShallow>(), p);
  }
}

}  // namespace tp::cuda
