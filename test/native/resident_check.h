// Checks of the resident step, on a GPU (ops_check.cu) and emulated (simt/main.cc).
#pragma once

#include "test/native/ops_support.h"

namespace tp::test {

/// A small model of the widths that the resident kernel takes: two leaves, 4 heads of 256 or 512, layers by
/// turns sliding and full. Its window is shorter than two of the attention's tiles and its ring wraps.
constexpr ModelShape kSmall = {2, 4, 2, 1, 10, 3, 128, 40, 2};

/// Of a resident step.
constexpr int kMostTokens = 16;

/// One rank on a device of its own.
struct Rank {
  cuda::CudaBackend backend;
  Model model;
  PeerMemory peers{};
  std::unique_ptr<Fused> fused;

  Rank(const ModelShape& shape, int rank, int size, int layer_count, int positions)
      : backend(rank), model(size, layer_count, kMostTokens, positions, kMostTokens, shape, rank, &backend) {
    set_angles(model);
    peers.rank = rank, peers.size = size;
    peers.floats = int64_t{2} * kHidden * kMostTokens;
    peers.inbox[rank] = static_cast<float*>(backend.allocate(peers.inbox_bytes()));
    cudaMemsetAsync(peers.inbox[rank], kNothingByte, peers.inbox_bytes(), backend.stream());
    auto* const flags = static_cast<uint32_t*>(backend.allocate_shared(2 * sizeof(uint32_t)));
    peers.abort = flags, peers.late = flags + 1;
    backend.finish();
  }
  /// Starts a whole step; `in` lies where this rank's device reaches it.
  void start(const Step& in, int T, int stages) {
    const Input input = in.device(T, T);
    backend.enter();
    backend.ops().embed(model.embed, model.d, input, backend);
    fused->run(0, stages, input);
  }
};

/// Every rank learns where the others' inboxes are.
inline void join(std::vector<std::unique_ptr<Rank>>& ranks) {
  for (auto& rank : ranks) {
    rank->backend.enter();
    for (auto& other : ranks) {
      if (other->peers.rank != rank->peers.rank) cudaDeviceEnablePeerAccess(other->peers.rank, 0);
      rank->peers.inbox[other->peers.rank] = other->peers.inbox[other->peers.rank];
    }
    cudaGetLastError();  // they may be joined already
    rank->fused = rank->backend.fuse(decoder_of(rank->model), rank->model.d, &rank->peers);
  }
}

inline std::vector<float> hidden_of(const Model& m, int rows) {
  std::vector<float> out(static_cast<size_t>(rows) * kHidden);
  m.on.read(out.data(), m.layers[0].ffn_out.hidden, out.size() * sizeof(float));
  return out;
}

/// repeats: of every whole step.
void test_fused(const ModelShape&, int layer_count, int positions, const std::vector<std::vector<int>>& steps,
                const std::vector<int>& batches, int repeats);
void test_choice(const ModelShape&, int copies);
void test_stretches(const ModelShape&, int layer_count, int positions, const std::vector<int>& at,
                    const std::vector<int>& batches, int repeats, uint32_t share);
void test_ranks(const ModelShape&, int size, int layer_count, int positions,
                const std::vector<std::vector<int>>& steps, const std::vector<int>& batches);
void test_replay(const ModelShape&, int layer_count, int positions, int T);
/// Every op. small: without the shapes of the 26B model; many: only what takes more than 8 tokens.
void check_all(bool small, bool many);
/// A few shapes that between them reach every kernel, in seconds where a GPU is emulated.
void check_quick();

}  // namespace tp::test
