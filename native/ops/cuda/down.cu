// Down projections: a segment is a leaf. Dense tiles are like attn_out's. An expert tile goes through the chosen experts in
// the order of their ids and adds each one's leaf, weighted, for the tokens that chose it; the tree comes last.
#include "ops/cuda/experts.cuh"

namespace tp::cuda {

namespace {

class Down {
 public:
  struct Parameters {
    DownArgs args;
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
    __host__ __device__ int bytes() const {
      return dense_bytes() + expert_bytes() + list_bytes() + columns.tokens * top_k * static_cast<int>(sizeof(float));
    }
  };

  __device__ Down(const Parameters& p, const Place& place, float* exchange, char* memory)
      : p_(p), place_(place), exchange_(exchange, place, p.dense.segments), dense_(reinterpret_cast<Bf16*>(memory)),
        expert_(reinterpret_cast<Bf16*>(memory + p.dense_bytes())),
        list_(reinterpret_cast<Chosen*>(memory + p.dense_bytes() + p.expert_bytes())),
        weight_(reinterpret_cast<float*>(memory + p.dense_bytes() + p.expert_bytes() + p.list_bytes())) {
    // An expert tile is several times a dense one, so most groups take the one kind and the rest the other.
    const int tiles = (p.hidden + kTileRows - 1) / kTileRows;
    const int expert_groups = min(tiles, max(1, place.groups * 3 / 4));
    const bool takes_experts = place.global_group < expert_groups;
    first_ = takes_experts ? place.global_group : place.global_group - expert_groups;
    step_ = takes_experts ? expert_groups : place.groups - expert_groups;
    tiles_ = first_ < tiles ? (tiles - first_ + step_ - 1) / step_ : 0;
    // The kernel before this one began when the router was done, so the choice may be read at once.
    chosen_ = choose_list(list_, p.args.expert_start, p.args.assignment, p.experts, p.top_k, p.columns);
    parts_ = takes_experts ? chosen_ : 0;
  }

  __device__ int known() const { return units(); }
  __device__ int units() const { return parts_ ? tiles_ * parts_ : tiles_; }
  __device__ void load() {
    const int tokens = p_.columns.tokens, first = p_.columns.first, planes = p_.columns.planes;
    load_columns(dense_, p_.dense, tokens, planes,
                 Plain{p_.args.dense_act + static_cast<int64_t>(first) * p_.dense.total, p_.dense.total});
    load_columns(expert_, p_.expert, tokens * p_.top_k, planes,
                 Plain{p_.args.expert_act + static_cast<int64_t>(first) * p_.top_k * p_.expert.total, p_.expert.total});
    for (int i = threadIdx.x; i < tokens * p_.top_k; i += kThreads) weight_[i] = p_.args.route_weight[first * p_.top_k + i];
  }
  __device__ Rows rows(int unit) const {
    if (!parts_) return rows_of(p_.args.down, p_.dense, place_, first_row(unit), p_.hidden);
    const int expert = list_[unit % parts_].expert;
    return rows_of(p_.args.expert_down + static_cast<int64_t>(expert) * p_.hidden * p_.expert.total, p_.expert, place_,
                   first_row(unit / parts_), p_.hidden);
  }
  __device__ int length(int) const { return segment_length(parts_ ? p_.expert : p_.dense, place_.segment); }
  __device__ const uint4* column(int unit) const {
    const int planes = p_.columns.planes, t = place_.row / planes;
    if (t >= p_.columns.tokens) return nullptr;
    if (!parts_) return column_of(dense_, p_.dense, place_, p_.columns.tokens * planes);
    const int slot = list_[unit % parts_].slot[t];
    if (slot < 0) return nullptr;
    const int column = (t * p_.top_k + slot) * planes + place_.row % planes;
    return reinterpret_cast<const uint4*>(expert_ + column * p_.expert.plane + place_.segment * p_.expert.padded) +
           place_.quarter;
  }
  __device__ void finish(int unit, const float (&sums)[4]) {
    if (!parts_) {
      put(first_row(unit), 0, sums);
      return;
    }
    const Chosen& chosen = list_[unit % parts_];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = (2 * place_.quarter + i) / p_.columns.planes;
      const int slot = t < p_.columns.tokens ? chosen.slot[t] : -1;
      if (slot < 0) continue;
      const float weight = weight_[t * p_.top_k + slot];
      sums_[i] = fused(weight, sums[i], sums_[i]);
      sums_[i + 2] = fused(weight, sums[i + 2], sums_[i + 2]);
    }
    if (unit % parts_ + 1 < parts_) return;
    put(first_row(unit / parts_), 1, sums_);
    for (float& sum : sums_) sum = 0;
  }

 private:
  __device__ int first_row(int tile) const { return (first_ + tile * step_) * kTileRows; }
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
  Bf16 *dense_, *expert_;
  Chosen* list_;
  float* weight_;  // (tokens, K)
  int first_, step_, tiles_, chosen_, parts_;
  float sums_[4] = {};
};

}  // namespace

void down(const DownArgs& a, const Dims& d, const Input& in, Backend& backend) {
  launch_gemv<Down>(of(backend), d, in.tokens,
                    {a, split_leaves(d.inter, d.leaves), split_leaves(d.moe_inter, d.leaves), {}, d.hidden, d.experts, d.top_k});
}

}  // namespace tp::cuda
