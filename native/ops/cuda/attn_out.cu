// o_proj on this rank's heads: a segment is a leaf.
#include "ops/cuda/gemv.cuh"
#include "ops/cuda/grouped/grouped.h"

namespace tp::cuda {

namespace {

struct AttnOutParameters {
  float* sum;
  const float* attention;
  Matrix weight;
  Split split;
  Columns columns;
  int rows, tiles;
  __host__ __device__ int segments() const { return split.segments; }
  __host__ __device__ int slot_bytes() const { return split.slot_bytes(); }
  bool aligned() const { return split.aligned; }
  __host__ __device__ int bytes() const {
    return columns.tokens * columns.planes * split.plane * static_cast<int>(sizeof(Bf16));
  }
};

template <bool Fast>
class AttnOut {
 public:
  using Parameters = AttnOutParameters;

  __device__ AttnOut(const Parameters& p, const Place& place, float* exchange, char* memory)
      : p_(p),
        place_(place),
        exchange_(exchange, place, p.split.segments),
        columns_(reinterpret_cast<Bf16*>(memory)),
        tiles_(place.share(p.tiles)) {}

  __device__ int tiles() const { return tiles_; }
  __device__ int known() const { return tiles_; }
  __device__ bool all_known() const { return true; }
  __device__ int parts() const { return 1; }
  __device__ const Split& split() const { return p_.split; }
  __device__ Tile rows(const Cursor& at) const { return {{&p_.weight, first_row(at)}, {}}; }
  __device__ void early() {}
  __device__ void list() {}
  __device__ void load() {
    load_columns<Fast>(columns_, p_.split, p_.columns.tokens, p_.columns.planes,
                       p_.attention + static_cast<int64_t>(p_.columns.first) * p_.split.total);
  }
  __device__ void enter(const Cursor&) {}
  __device__ const uint4* column() const {
    return column_of(columns_, p_.split, place_, p_.columns.tokens * p_.columns.planes);
  }
  __device__ void finish(const Cursor& at, const float (&sums)[4]) {
    exchange_.give(place_, sums);
#pragma unroll 1
    for (int i = place_.thread; i < kTileRows * p_.columns.tokens; i += place_.threads) {
      const int row = first_row(at) + i % kTileRows, t = i / kTileRows;
      if (row < p_.rows)
        p_.sum[static_cast<int64_t>(p_.columns.first + t) * p_.rows + row] =
            exchange_.template at<Fast>(i % kTileRows, t, p_.columns.planes);
    }
  }

 private:
  __device__ int first_row(const Cursor& at) const {
    return (place_.global_group + at.tile * place_.groups) * kTileRows;
  }

  const Parameters& p_;
  const Place& place_;
  Exchange exchange_;
  Bf16* columns_;
  int tiles_;
};

}  // namespace

void attn_out(const AttnOutArgs& a, const Dims& d, const Input& in, Backend& backend) {
  if (grouped::takes(a, d, in.tokens)) return grouped::attn_out(a, d, in, of(backend));
  const Split split = split_leaves(a.columns, d.leaves);
  launch_gemv<AttnOut>(
      of(backend), d, in.tokens,
      {a.sum, a.attention, matrix_of(a.weight, d.hidden, split), split, {}, d.hidden, tiles_of(d.hidden)});
}

}  // namespace tp::cuda
