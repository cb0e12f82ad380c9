// Down projections: a segment is a leaf. Dense tiles are like attn_out's. An expert tile goes through the
// chosen experts in the order of their ids and adds each one's leaf, weighted, for the tokens that chose it;
// the tree comes last.
#include "ops/cuda/experts.cuh"

namespace tp::cuda {

namespace {

class Down {
 public:
  struct Parameters {
    DownArgs args;
    Matrix down, experts_down;
    Split dense, expert;
    Columns columns;
    int hidden, experts, top_k;
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
    __host__ __device__ int column_bytes() const {
      return dense_bytes() > expert_bytes() ? dense_bytes() : expert_bytes();
    }
    __host__ __device__ int bytes() const {
      return column_bytes() + list_bytes() + columns.tokens * top_k * static_cast<int>(sizeof(float));
    }
  };

  __device__ Down(const Parameters& p, const Place& place, float* exchange, char* memory)
      : p_(p),
        place_(place),
        exchange_(exchange, place, p.dense.segments),
        columns_(reinterpret_cast<Bf16*>(memory)),
        list_(reinterpret_cast<Chosen*>(memory + p.column_bytes())),
        weight_(reinterpret_cast<float*>(memory + p.column_bytes() + p.list_bytes())) {
    // The kernel before this one began when the router was done, so the choice may be read at once.
    chosen_ = choose_list(list_, p.args.expert_start, p.args.assignment, p.experts, p.top_k, p.columns);
    // Blocks are shared out by the bytes that the two kinds of tile read.
    const int tiles = (p.hidden + kTileRows - 1) / kTileRows, blocks = gridDim.x,
              groups = place.groups / blocks;
    const int64_t dense_work = p.dense.total,
                  all = dense_work + static_cast<int64_t>(chosen_) * p.expert.total;
    const int dense_blocks = max(1, min(blocks - 1, static_cast<int>((blocks * dense_work + all / 2) / all)));
    const int first = blockIdx.x < dense_blocks ? 0 : dense_blocks;
    step_ = (first ? blocks - dense_blocks : dense_blocks) * groups;
    first_ = place.group * (step_ / groups) + blockIdx.x - first;
    tiles_ = first_ < tiles ? (tiles - first_ + step_ - 1) / step_ : 0;
    experts_ = first > 0;
  }

  __device__ int known() const { return tiles_; }
  __device__ int tiles() const { return tiles_; }
  __device__ int parts() const { return experts_ ? chosen_ : 1; }
  __device__ const Split& split() const { return experts_ ? p_.expert : p_.dense; }
  __device__ void load() {
    const int tokens = p_.columns.tokens, first = p_.columns.first, planes = p_.columns.planes;
    if (!experts_) {
      load_columns(columns_, p_.dense, tokens, planes,
                   Plain{p_.args.dense_act + static_cast<int64_t>(first) * p_.dense.total, p_.dense.total});
      return;
    }
    load_columns(columns_, p_.expert, tokens * p_.top_k, planes,
                 Plain{p_.args.expert_act + static_cast<int64_t>(first) * p_.top_k * p_.expert.total,
                       p_.expert.total});
    for (int i = threadIdx.x; i < tokens * p_.top_k; i += kThreads)
      weight_[i] = p_.args.route_weight[first * p_.top_k + i];
  }
  __device__ Half low(const Cursor& at) const { return half(at, 0); }
  __device__ Half high(const Cursor& at) const { return half(at, 8); }
  __device__ const uint4* column(const Cursor& at) const {
    const int planes = p_.columns.planes;
    if (!experts_) return column_of(columns_, p_.dense, place_, p_.columns.tokens * planes);
    const int t = place_.row / planes;
    if (t >= p_.columns.tokens) return nullptr;
    const int slot = list_[at.part].slot[t];
    if (slot < 0) return nullptr;
    const int column = (t * p_.top_k + slot) * planes + place_.row % planes;
    return reinterpret_cast<const uint4*>(columns_ + column * p_.expert.plane +
                                          p_.expert.place(place_.segment)) +
           place_.quarter;
  }
  __device__ void finish(const Cursor& at, const float (&sums)[4]) {
    if (!experts_) {
      put(first_row(at), 0, sums);
      return;
    }
    const Chosen& chosen = list_[at.part];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = (2 * place_.quarter + i) / p_.columns.planes;
      const int slot = t < p_.columns.tokens ? chosen.slot[t] : -1;
      if (slot < 0) continue;
      const float weight = weight_[t * p_.top_k + slot];
      sums_[i] = fused(weight, sums[i], sums_[i]);
      sums_[i + 2] = fused(weight, sums[i + 2], sums_[i + 2]);
    }
    if (at.part + 1 < chosen_) return;
    put(first_row(at), 1, sums_);
    for (float& sum : sums_) sum = 0;
  }

 private:
  __device__ int first_row(const Cursor& at) const { return (first_ + at.tile * step_) * kTileRows; }
  __device__ Half half(const Cursor& at, int below) const {
    const int row = first_row(at) + below;
    if (!experts_) return {&p_.down, row};
    return {&p_.experts_down, list_[at.part].expert * p_.hidden + row};
  }
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
  Chosen* list_;
  float* weight_;  // (tokens, K)
  int first_, step_, tiles_, chosen_;
  bool experts_;  // else dense
  float sums_[4] = {};
};

}  // namespace

void down(const DownArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const Split dense = split_leaves(d.inter, d.leaves), expert = split_leaves(d.moe_inter, d.leaves);
  launch_gemv<Down>(of(backend), d, in.tokens,
                    {a,
                     matrix_of(a.down, d.hidden, dense),
                     matrix_of(a.expert_down, int64_t{d.experts} * d.hidden, expert),
                     dense,
                     expert,
                     {},
                     d.hidden,
                     d.experts,
                     d.top_k});
}

}  // namespace tp::cuda
