// Gate and up projections and GELU(gate) * up. A tile is 8 gate rows and the 8 up rows that belong to them,
// of the dense MLP or of one chosen expert. Every tile multiplies all tokens of the launch; those that chose
// the expert are kept.
#include "ops/cuda/experts.cuh"

namespace tp::cuda {

namespace {

constexpr int kWidth = kTileRows / 2;  // columns of the activation that a tile gives

class GateUp {
 public:
  struct Parameters {
    GateUpArgs args;
    Matrix gate, up, experts_gate_up;
    Split split;
    Columns columns;
    int inter, moe_inter, experts, top_k;
    __host__ __device__ int segments() const { return split.segments; }
    __host__ __device__ int slot_bytes() const { return split.slot_bytes(); }
    __host__ __device__ int plane_bytes() const {
      return columns.tokens * columns.planes * split.plane * static_cast<int>(sizeof(Bf16));
    }
    __host__ __device__ int bytes() const {
      return 2 * plane_bytes() + chosen_bytes(experts, top_k, columns.tokens);
    }
  };

  __device__ GateUp(const Parameters& p, const Place& place, float* exchange, char* memory)
      : p_(p),
        place_(place),
        exchange_(exchange, place, p.split.segments),
        dense_(reinterpret_cast<Bf16*>(memory)),
        expert_(reinterpret_cast<Bf16*>(memory + p.plane_bytes())),
        list_(reinterpret_cast<Chosen*>(memory + 2 * p.plane_bytes())),
        dense_tiles_((p.inter + kWidth - 1) / kWidth),
        expert_tiles_((p.moe_inter + kWidth - 1) / kWidth) {}

  __device__ int known() const { return place_.share(dense_tiles_); }
  __device__ int tiles() const { return place_.share(dense_tiles_ + chosen_ * expert_tiles_); }
  __device__ int parts() const { return 1; }
  __device__ const Split& split() const { return p_.split; }
  __device__ void load() {
    const int n = p_.split.total;
    const int64_t from = static_cast<int64_t>(p_.columns.first) * n;
    chosen_ = choose_list(list_, p_.args.expert_start, p_.args.assignment, p_.experts, p_.top_k, p_.columns);
    load_columns(dense_, p_.split, p_.columns.tokens, p_.columns.planes, Plain{p_.args.dense_in + from, n});
    load_columns(expert_, p_.split, p_.columns.tokens, p_.columns.planes, Plain{p_.args.expert_in + from, n});
  }
  __device__ Half low(const Cursor& at) const {
    const Tile t = tile(at);
    if (t.chosen < 0) return {&p_.gate, t.first};
    return {&p_.experts_gate_up, list_[t.chosen].expert * 2 * p_.moe_inter + t.first};
  }
  __device__ Half high(const Cursor& at) const {
    const Tile t = tile(at);
    if (t.chosen < 0) return {&p_.up, t.first};
    return {&p_.experts_gate_up, (list_[t.chosen].expert * 2 + 1) * p_.moe_inter + t.first};
  }
  __device__ const uint4* column(const Cursor& at) const {
    return column_of(tile(at).chosen < 0 ? dense_ : expert_, p_.split, place_,
                     p_.columns.tokens * p_.columns.planes);
  }
  __device__ void finish(const Cursor& at, const float (&sums)[4]) {
    exchange_.give(place_, sums);
    const Tile to = tile(at);
    const bool bfloat16 = p_.columns.planes == 1;
    for (int i = place_.thread; i < kWidth * p_.columns.tokens; i += place_.threads) {
      const int row = i % kWidth, t = i / kWidth, column = to.first + row;
      if (column >= (to.chosen < 0 ? p_.inter : p_.moe_inter)) continue;
      const int slot = to.chosen < 0 ? 0 : list_[to.chosen].slot[t];
      if (slot < 0) continue;
      const float gate = round_to(bfloat16, exchange_.at(row, t, p_.columns.planes));
      const float up = round_to(bfloat16, exchange_.at(row + kWidth, t, p_.columns.planes));
      const float act = round_to(bfloat16, round_to(bfloat16, gelu_tanh(gate)) * up);
      const int64_t token = p_.columns.first + t;
      if (to.chosen < 0)
        p_.args.dense_act[token * p_.inter + column] = act;
      else
        p_.args.expert_act[(token * p_.top_k + slot) * p_.moe_inter + column] = act;
    }
  }

 private:
  struct Tile {
    int chosen;  // index into the list, -1: the dense MLP
    int first;   // column of the activation
  };
  __device__ Tile tile(const Cursor& at) const {
    const int i = place_.global_group + at.tile * place_.groups, j = i - dense_tiles_;
    if (j < 0) return {-1, i * kWidth};
    return {j / expert_tiles_, j % expert_tiles_ * kWidth};
  }

  const Parameters& p_;
  const Place& place_;
  Exchange exchange_;
  Bf16 *dense_, *expert_;
  Chosen* list_;
  int dense_tiles_, expert_tiles_, chosen_ = 0;
};

}  // namespace

void gate_up(const GateUpArgs& a, const Dims& d, const Input& in, Backend& backend) {
  const Split split = split_whole(d.hidden);
  launch_gemv<GateUp>(of(backend), d, in.tokens,
                      {a,
                       matrix_of(a.gate, d.inter, split),
                       matrix_of(a.up, d.inter, split),
                       matrix_of(a.expert_gate_up, int64_t{d.experts} * 2 * d.moe_inter, split),
                       split,
                       {},
                       d.inter,
                       d.moe_inter,
                       d.experts,
                       d.top_k});
}

}  // namespace tp::cuda
