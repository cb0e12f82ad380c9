// Gate and up projections and GELU(gate) * up. A tile is 8 gate rows and the 8 up rows that belong to them,
// of the dense MLP or of one chosen expert. Every tile multiplies all tokens of the launch; those that chose
// the expert are kept.
#include "ops/cuda/experts.cuh"
#include "ops/cuda/grouped/grouped.h"

namespace tp::cuda {

namespace {

constexpr int kWidth = kTileRows / 2;  // columns of the activation that a tile gives

struct GateUpParameters {
  GateUpArgs args;
  Matrix gate, up, experts_gate_up;
  Split split;
  Columns columns;
  int inter, moe_inter, experts, assignments, dense_tiles;
  Divider top_k, expert_tiles;
  __host__ __device__ int segments() const { return split.segments; }
  __host__ __device__ int slot_bytes() const { return split.slot_bytes(); }
  bool aligned() const { return split.aligned; }
  __host__ __device__ int plane_bytes() const {
    return columns.tokens * columns.planes * split.plane * static_cast<int>(sizeof(Bf16));
  }
  __host__ __device__ int bytes() const {
    return 2 * plane_bytes() + chosen_bytes(experts, static_cast<int>(top_k.divisor), columns.tokens);
  }
};

template <bool Fast>
class GateUp {
 public:
  using Parameters = GateUpParameters;

  __device__ GateUp(const Parameters& p, const Place& place, float* exchange, char* memory)
      : p_(p),
        place_(place),
        exchange_(exchange, place, p.split.segments),
        dense_(reinterpret_cast<Bf16*>(memory)),
        expert_(reinterpret_cast<Bf16*>(memory + p.plane_bytes())),
        chosen_(reinterpret_cast<int*>(memory + 2 * p.plane_bytes())),
        list_(reinterpret_cast<Chosen*>(chosen_ + 4)) {}

  __device__ int known() const { return place_.share(p_.dense_tiles); }
  __device__ bool all_known() const { return false; }
  __device__ int tiles() const {
    return place_.share(p_.dense_tiles + *chosen_ * static_cast<int>(p_.expert_tiles.divisor));
  }
  __device__ int parts() const { return 1; }
  __device__ const Split& split() const { return p_.split; }
  __device__ Tile rows(const Cursor& at) const {
    const Target t = target(at);
    if (t.chosen < 0) return {{&p_.gate, t.first}, {&p_.up, t.first}};
    const int first = list_[t.chosen].expert * 2 * p_.moe_inter + t.first;
    return {{&p_.experts_gate_up, first}, {&p_.experts_gate_up, first + p_.moe_inter}};
  }
  __device__ void early() {}
  __device__ void list() {
    choose_list(list_, chosen_, p_.args.expert_start, p_.args.assignment, p_.assignments, p_.experts,
                p_.top_k, p_.columns);
  }
  __device__ void load() {
    const int64_t from = static_cast<int64_t>(p_.columns.first) * p_.split.total;
#pragma unroll 1
    for (int which = 0; which < 2; which++)
      load_columns<Fast>(which ? expert_ : dense_, p_.split, p_.columns.tokens, p_.columns.planes,
                         (which ? p_.args.expert_in : p_.args.dense_in) + from);
  }
  __device__ void enter(const Cursor& at) { now_ = target(at); }
  __device__ const uint4* column() const {
    return column_of(now_.chosen < 0 ? dense_ : expert_, p_.split, place_,
                     p_.columns.tokens * p_.columns.planes);
  }
  __device__ void finish(const Cursor&, const float (&sums)[4]) {
    exchange_.give(place_, sums);
    const bool bfloat16 = Fast || p_.columns.planes == 1, dense = now_.chosen < 0;
#pragma unroll 1
    for (int i = place_.thread; i < kWidth * p_.columns.tokens; i += place_.threads) {
      const int row = i % kWidth, t = i / kWidth, column = now_.first + row;
      if (column >= (dense ? p_.inter : p_.moe_inter)) continue;
      const int slot = dense ? 0 : list_[now_.chosen].slot(t);
      if (slot < 0) continue;
      float half[2];
#pragma unroll 1
      for (int h = 0; h < 2; h++)
        half[h] = round_to(bfloat16, exchange_.template at<Fast>(row + h * kWidth, t, p_.columns.planes));
      const float act = round_to(bfloat16, round_to(bfloat16, gelu_tanh(half[0])) * half[1]);
      const int64_t token = p_.columns.first + t;
      if (dense)
        p_.args.dense_act[token * p_.inter + column] = act;
      else
        p_.args.expert_act[(token * p_.top_k.divisor + slot) * p_.moe_inter + column] = act;
    }
  }

 private:
  struct Target {
    int chosen;  // index into the list, -1: the dense MLP
    int first;   // column of the activation
  };
  __device__ Target target(const Cursor& at) const {
    const int i = place_.global_group + at.tile * place_.groups, j = i - p_.dense_tiles;
    if (j < 0) return {-1, i * kWidth};
    const int chosen = p_.expert_tiles.of(j);
    return {chosen, (j - chosen * static_cast<int>(p_.expert_tiles.divisor)) * kWidth};
  }

  const Parameters& p_;
  const Place& place_;
  Exchange exchange_;
  Bf16 *dense_, *expert_;
  int* chosen_;  // length of the list
  Chosen* list_;
  Target now_;
};

}  // namespace

void gate_up(const GateUpArgs& a, const Dims& d, const Input& in, Backend& backend) {
  if (grouped::takes(a, d, in.tokens)) return grouped::gate_up(a, d, in, of(backend));
  const Split split = split_whole(d.hidden);
  const int dense_rows = d.inter > 0 ? d.inter : kWidth;  // a benchmark of the experts alone has none
  launch_gemv<GateUp>(of(backend), d, in.tokens,
                      {a,
                       matrix_of(a.gate, dense_rows, split, kWidth),
                       matrix_of(a.up, dense_rows, split, kWidth),
                       matrix_of(a.expert_gate_up, int64_t{d.experts} * 2 * d.moe_inter, split, kWidth),
                       split,
                       {},
                       d.inter,
                       d.moe_inter,
                       d.experts,
                       in.tokens * d.top_k,
                       (d.inter + kWidth - 1) / kWidth,
                       divider(d.top_k),
                       divider((d.moe_inter + kWidth - 1) / kWidth)});
}

}  // namespace tp::cuda
