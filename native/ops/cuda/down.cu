// Down projections: a segment is a leaf. Dense tiles are like attn_out's. An expert tile goes through the chosen experts in
// the order of their ids and adds each one's leaf, weighted, for the tokens that chose it; the tree comes last.
#include "ops/cuda/experts.cuh"

namespace tp::cuda {

namespace {

/// What every column takes from one chosen expert.
struct Shares {
  int row[kColumns];       // row of the activations in shared memory, -1 without a share
  float weight[kColumns];  // routing weight of the column's token
};

class Down {
 public:
  struct Parameters {
    DownArgs args;
    Matrix down, experts_down;
    Split dense, expert;
    Columns columns;
    int hidden, experts, top_k, assignments;
    __host__ __device__ int segments() const { return dense.segments; }
    __host__ __device__ int dense_bytes() const {
      return columns.tokens * columns.planes * dense.plane * static_cast<int>(sizeof(Bf16));
    }
    __host__ __device__ int expert_bytes() const {
      return columns.tokens * top_k * columns.planes * expert.plane * static_cast<int>(sizeof(Bf16));
    }
    __host__ __device__ int list_bytes() const { return chosen_bytes(experts, top_k, columns.tokens); }
    __host__ __device__ int slot_bytes() const {
      return dense.slot_bytes() > expert.slot_bytes() ? dense.slot_bytes() : expert.slot_bytes();
    }
    /// A block takes tiles of one kind.
    __host__ __device__ int column_bytes() const { return dense_bytes() > expert_bytes() ? dense_bytes() : expert_bytes(); }
    __host__ __device__ int bytes() const {
      return column_bytes() + list_bytes() + most_chosen(experts, top_k, columns.tokens) * static_cast<int>(sizeof(Shares));
    }
  };

  __device__ Down(const Parameters& p, const Place& place, float* exchange, char* memory)
      : p_(p), place_(place), exchange_(exchange, place, p.dense.segments), columns_(reinterpret_cast<Bf16*>(memory)),
        chosen_(reinterpret_cast<int*>(memory + p.column_bytes())), list_(reinterpret_cast<Chosen*>(chosen_ + 4)),
        shares_(reinterpret_cast<Shares*>(memory + p.column_bytes() + p.list_bytes())) {
    // Blocks are shared out by the bytes that the two kinds of tile read; each token brings another K experts at most.
    const int blocks = gridDim.x, groups = place.groups / blocks;
    const int64_t dense = p.dense.total;
    const int64_t all = dense + static_cast<int64_t>(most_chosen(p.experts, p.top_k, p.columns.tokens)) * p.expert.total;
    const int dense_blocks = max(1, min(blocks - 1, static_cast<int>((blocks * dense + all / 2) / all)));
    experts_ = blockIdx.x >= dense_blocks;
    step_ = (experts_ ? blocks - dense_blocks : dense_blocks) * groups;
    first_ = place.group * (step_ / groups) + blockIdx.x - (experts_ ? dense_blocks : 0);
    const int tiles = (p.hidden + kTileRows - 1) / kTileRows;
    tiles_ = first_ < tiles ? (tiles - first_ + step_ - 1) / step_ : 0;
  }

  /// The kernel before this one began when the router was done, so the choice may be read at once.
  __device__ void early() {
    if (experts_) choose_list(list_, chosen_, p_.args.expert_start, p_.args.assignment, p_.assignments, p_.experts, p_.top_k, p_.columns);
  }
  __device__ void list() {}
  __device__ bool all_known() const { return true; }
  __device__ int known() const { return tiles_; }
  __device__ int tiles() const { return tiles_; }
  __device__ int parts() const { return experts_ ? *chosen_ : 1; }
  __device__ const Split& split() const { return experts_ ? p_.expert : p_.dense; }
  __device__ void load() {
    const int tokens = p_.columns.tokens, first = p_.columns.first, planes = p_.columns.planes;
    if (!experts_) {
      load_columns(columns_, p_.dense, tokens, planes,
                   Plain{p_.args.dense_act + static_cast<int64_t>(first) * p_.dense.total, p_.dense.total});
      return;
    }
    load_columns(columns_, p_.expert, tokens * p_.top_k, planes,
                 Plain{p_.args.expert_act + static_cast<int64_t>(first) * p_.top_k * p_.expert.total, p_.expert.total});
    for (int i = threadIdx.x; i < *chosen_ * kColumns; i += kThreads) {
      const int part = i / kColumns, column = i % kColumns, t = p_.columns.token_of(column);
      const int slot = t < tokens ? list_[part].slot[t] : -1;
      shares_[part].row[column] = slot < 0 ? -1 : (t * p_.top_k + slot) * planes + p_.columns.plane_of(column);
      shares_[part].weight[column] = slot < 0 ? 0 : p_.args.route_weight[(first + t) * p_.top_k + slot];
    }
  }
  __device__ Tile rows(const Cursor& at) const {
    if (!experts_) return {{&p_.down, first_row(at)}, {}};
    return {{&p_.experts_down, list_[at.part].expert * p_.hidden + first_row(at)}, {}};
  }
  __device__ void enter(const Cursor& at) {
    if (!experts_) return;
    const Shares& shares = shares_[at.part];
    row_ = shares.row[place_.row];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      share_[i] = shares.row[2 * place_.quarter + i] >= 0;
      weight_[i] = shares.weight[2 * place_.quarter + i];
    }
  }
  __device__ const uint4* column() const {
    if (!experts_) return column_of(columns_, p_.dense, place_, p_.columns.tokens * p_.columns.planes);
    if (row_ < 0) return nullptr;
    return reinterpret_cast<const uint4*>(columns_ + row_ * p_.expert.plane + place_.segment * p_.expert.padded) + place_.quarter;
  }
  __device__ void finish(const Cursor& at, const float (&sums)[4]) {
    if (!experts_) {
      put(first_row(at), 0, sums);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!share_[i]) continue;
      sums_[i] = fused(weight_[i], sums[i], sums_[i]);
      sums_[i + 2] = fused(weight_[i], sums[i + 2], sums_[i + 2]);
    }
    if (at.part + 1 < parts()) return;
    put(first_row(at), 1, sums_);
    for (float& sum : sums_) sum = 0;
  }

 private:
  __device__ int first_row(const Cursor& at) const { return (first_ + at.tile * step_) * kTileRows; }
  __device__ void put(int first, int which, const float (&sums)[4]) {
    exchange_.give(place_, sums);
    for (int i = place_.thread; i < kTileRows * p_.columns.tokens; i += place_.threads) {
      const int row = first + i % kTileRows, t = i / kTileRows;
      if (row < p_.hidden)
        p_.args.sum[(static_cast<int64_t>(p_.columns.first + t) * 2 + which) * p_.hidden + row] =
            exchange_.at(i % kTileRows, t, p_.columns.planes);
    }
  }

  const Parameters& p_;
  const Place& place_;
  Exchange exchange_;
  Bf16* columns_;
  int* chosen_;  // length of the list
  Chosen* list_;
  Shares* shares_;  // of every chosen expert
  int first_, step_, tiles_;
  bool experts_;  // else dense
  // Of the unit: the lane's row of activations, and what the two columns of its sums take.
  int row_ = -1;
  bool share_[2] = {};
  float weight_[2] = {};
  float sums_[4] = {};
};

}  // namespace

void down(const DownArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const Split dense = split_leaves(d.inter, d.leaves), expert = split_leaves(d.moe_inter, d.leaves);
  launch_gemv<Down>(of(backend), d, in.tokens,
                    {a, matrix_of(a.down, d.hidden, dense), matrix_of(a.expert_down, int64_t{d.experts} * d.hidden, expert), dense,
                     expert, {}, d.hidden, d.experts, d.top_k, in.tokens * d.top_k});
}

}  // namespace tp::cuda
