// Down projections: a segment is a leaf. Dense tiles are like attn_out's. An expert tile goes through the
// chosen experts in the order of their ids and adds each one's leaf, weighted, for the tokens that chose it;
// the tree comes last.
#include "ops/cuda/experts.cuh"
#include "ops/cuda/grouped/grouped.h"

namespace tp::cuda {

namespace {

/// What every column takes from one chosen expert.
struct Shares {
  int row[kColumns];       // row of the activations in shared memory, -1 without a share
  float weight[kColumns];  // routing weight of the column's token
};

struct DownParameters {
  DownArgs args;
  Matrix down, experts_down;
  Split dense, expert;
  Columns columns;
  int hidden, experts, assignments, tiles, blocks;
  bool has_dense;  // a benchmark of the experts alone has not
  Divider top_k;
  __host__ __device__ int segments() const { return dense.segments; }
  __host__ __device__ int slot_bytes() const {
    return dense.slot_bytes() > expert.slot_bytes() ? dense.slot_bytes() : expert.slot_bytes();
  }
  bool aligned() const { return dense.aligned && expert.aligned; }
  __host__ __device__ int k() const { return static_cast<int>(top_k.divisor); }
  __host__ __device__ int chosen() const { return most_chosen(experts, k(), columns.tokens); }
  /// A block takes tiles of one kind.
  __host__ __device__ int column_bytes() const {
    const int a = dense.plane, b = k() * expert.plane;
    return columns.tokens * columns.planes * (a > b ? a : b) * static_cast<int>(sizeof(Bf16));
  }
  __host__ __device__ int bytes() const {
    return column_bytes() + chosen_bytes(experts, k(), columns.tokens) +
           chosen() * static_cast<int>(sizeof(Shares));
  }
  /// Blocks that take dense tiles: the blocks are shared out by the bytes that the two kinds read.
  __device__ int dense_blocks() const {
    if (!has_dense) return 0;
    const float share = __fdividef(dense.total, dense.total + chosen() * expert.total);
    return max(1, min(blocks - 1, __float2int_rn(blocks * share)));
  }
};

template <bool Fast>
class Down {
 public:
  using Parameters = DownParameters;

  __device__ Down(const Parameters& p, const Place& place, float* exchange, char* memory)
      : p_(p),
        place_(place),
        exchange_(exchange, place, p.dense.segments),
        columns_(reinterpret_cast<Bf16*>(memory)),
        chosen_(reinterpret_cast<int*>(memory + p.column_bytes())),
        list_(reinterpret_cast<Chosen*>(chosen_ + 4)),
        shares_(reinterpret_cast<Shares*>(memory + p.column_bytes() +
                                          chosen_bytes(p.experts, p.k(), p.columns.tokens))) {
    const int dense = p.dense_blocks(), block = blockIdx.x;
    experts_ = block >= dense;
    const int blocks = experts_ ? p.blocks - dense : dense;
    first_ = place.group * blocks + block - (experts_ ? dense : 0);
    step_ = blocks * (kWarps >> (__ffs(p.dense.segments) - 1));
  }

  __device__ int known() const { return tiles(); }
  __device__ int tiles() const {
    return first_ >= p_.tiles ? 0 : __float2int_rd(__fdividef(p_.tiles - first_ - 0.5f, step_)) + 1;
  }
  __device__ bool all_known() const { return true; }
  __device__ int parts() const { return experts_ ? *chosen_ : 1; }
  __device__ const Split& split() const { return experts_ ? p_.expert : p_.dense; }
  __device__ Tile rows(const Cursor& at) const {
    if (!experts_) return {{&p_.down, first_row(at)}, {}};
    return {{&p_.experts_down, list_[at.part].expert * p_.hidden + first_row(at)}, {}};
  }
  /// The kernel before this one began when the router was done, so the choice may be read at once.
  __device__ void early() {
    if (experts_)
      choose_list(list_, chosen_, p_.args.expert_start, p_.args.assignment, p_.assignments, p_.experts,
                  p_.top_k, p_.columns);
  }
  __device__ void list() {}
  __device__ void load() {
    const int tokens = p_.columns.tokens, planes = p_.columns.planes, k = p_.k();
    const int64_t first = p_.columns.first;
    load_columns<Fast>(columns_, split(), experts_ ? tokens * k : tokens, planes,
                       experts_ ? p_.args.expert_act + first * k * p_.expert.total
                                : p_.args.dense_act + first * p_.dense.total);
    if (!experts_) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < *chosen_ * kColumns; i += kThreads) {
      const int part = i / kColumns, column = i % kColumns;
      const int t = Fast || planes == 1 ? column : column / 3, plane = Fast || planes == 1 ? 0 : column % 3;
      const int slot = t < tokens ? list_[part].slot(t) : -1;
      shares_[part].row[column] = slot < 0 ? -1 : (t * k + slot) * planes + plane;
      shares_[part].weight[column] = slot < 0 ? 0 : p_.args.route_weight[(first + t) * k + slot];
    }
  }
  __device__ void enter(const Cursor& at) {
    if (!experts_) return;
    const Shares& shares = shares_[at.part];
    row_ = shares.row[place_.row];
    share_ = *reinterpret_cast<const int2*>(shares.row + 2 * place_.quarter);
    weight_ = *reinterpret_cast<const float2*>(shares.weight + 2 * place_.quarter);
  }
  __device__ const uint4* column() const {
    if (!experts_) return column_of(columns_, p_.dense, place_, p_.columns.tokens * p_.columns.planes);
    if (row_ < 0) return nullptr;
    return reinterpret_cast<const uint4*>(columns_ + row_ * p_.expert.plane +
                                          place_.segment * p_.expert.padded) +
           place_.quarter;
  }
  __device__ void finish(const Cursor& at, const float (&sums)[4]) {
    if (experts_) {
      if (share_.x >= 0)
        sums_[0] = fused(weight_.x, sums[0], sums_[0]), sums_[2] = fused(weight_.x, sums[2], sums_[2]);
      if (share_.y >= 0)
        sums_[1] = fused(weight_.y, sums[1], sums_[1]), sums_[3] = fused(weight_.y, sums[3], sums_[3]);
      if (at.part + 1 < parts()) return;
    } else {
      for (int i = 0; i < 4; i++) sums_[i] = sums[i];
    }
    exchange_.give(place_, sums_);
    for (float& sum : sums_) sum = 0;
#pragma unroll 1
    for (int i = place_.thread; i < kTileRows * p_.columns.tokens; i += place_.threads) {
      const int row = first_row(at) + i % kTileRows, t = i / kTileRows;
      if (row < p_.hidden)
        p_.args.sum[(static_cast<int64_t>(p_.columns.first + t) * 2 + experts_) * p_.hidden + row] =
            exchange_.template at<Fast>(i % kTileRows, t, p_.columns.planes);
    }
  }

 private:
  __device__ int first_row(const Cursor& at) const { return (first_ + at.tile * step_) * kTileRows; }

  const Parameters& p_;
  const Place& place_;
  Exchange exchange_;
  Bf16* columns_;
  int* chosen_;  // length of the list
  Chosen* list_;
  Shares* shares_;  // of every chosen expert
  int first_, step_;
  bool experts_;  // else dense
  // Of the unit: the lane's row of activations, and what the two columns of its sums take.
  int row_ = -1;
  int2 share_ = {-1, -1};
  float2 weight_ = {0, 0};
  float sums_[4] = {};
};

}  // namespace

void down(const DownArgs& a, const Dims& d, const Input& in, Backend& backend) {
  if (grouped::takes(a, d, in.tokens)) return grouped::down(a, d, in, of(backend));
  CudaBackend& cuda = of(backend);
  const Split expert = split_leaves(d.moe_inter, d.leaves),
              dense = d.inter > 0 ? split_leaves(d.inter, d.leaves) : expert;
  launch_gemv<Down>(cuda, d, in.tokens,
                    {a,
                     matrix_of(a.down, d.hidden, dense),
                     matrix_of(a.expert_down, int64_t{d.experts} * d.hidden, expert),
                     dense,
                     expert,
                     {},
                     d.hidden,
                     d.experts,
                     in.tokens * d.top_k,
                     tiles_of(d.hidden),
                     cuda.processors(),
                     d.inter > 0,
                     divider(d.top_k)});
}

}  // namespace tp::cuda
