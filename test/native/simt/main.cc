// The checks of the CUDA kernels, emulated: simt_check PART [SEED]. Prints "seed ..., N comparisons, N
// failures, N faults"; exit code 1 when there is any, or when nothing was compared.
#include <chrono>
#include <cstdlib>

#include "comm/collective.h"
#include "test/native/resident_check.h"
#include "test/native/simt/simt.h"

using namespace tp;
using namespace tp::test;

namespace {

/// The peer collective between `size` devices, in turn with sums of other lengths, against the tree.
void test_peer(int size) {
  where = "peer, " + std::to_string(size) + " ranks";
  const int before = failures;
  constexpr int64_t kMost = 2000;
  std::vector<std::unique_ptr<DeviceCollective>> ranks;
  std::vector<cudaStream_t> streams(static_cast<size_t>(size));
  std::vector<float*> memory(static_cast<size_t>(size)), all(static_cast<size_t>(size));
  std::vector<std::vector<uint8_t>> hellos;
  for (int r = 0; r < size; r++) {
    const auto i = static_cast<size_t>(r);
    cudaSetDevice(r);
    ranks.push_back(make_peer(r, size, kMost));
    hellos.push_back(ranks.back()->hello());
    cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking);
    cudaMalloc(&memory[i], kMost * sizeof(float));
    cudaMalloc(&all[i], kMost * sizeof(float) * i + kMost * sizeof(float) * static_cast<size_t>(size));
  }
  for (auto& rank : ranks) rank->connect(hellos, 1);
  for (const int64_t floats : {int64_t{1}, int64_t{5}, int64_t{769}, kMost, int64_t{2}, int64_t{300}}) {
    std::vector<std::vector<float>> values(static_cast<size_t>(size));
    std::vector<float> sum, together;
    for (auto& x : values) {
      for (int64_t i = 0; i < floats; i++) x.push_back(uniform());
      together.insert(together.end(), x.begin(), x.end());
    }
    for (size_t i = 0; i < static_cast<size_t>(floats); i++) {
      float leaves[kMaxLeaves];
      for (size_t r = 0; r < values.size(); r++) leaves[r] = values[r][i];
      sum.push_back(tree_sum(leaves, size));
    }
    for (size_t r = 0; r < values.size(); r++) {
      cudaSetDevice(static_cast<int>(r));
      cudaMemcpyAsync(memory[r], values[r].data(), values[r].size() * sizeof(float), cudaMemcpyHostToDevice,
                      streams[r]);
      ranks[r]->all_gather(memory[r], all[r], floats, streams[r]);
      ranks[r]->all_reduce(memory[r], floats, streams[r]);
    }
    for (size_t r = 0; r < values.size(); r++) {
      cudaStreamSynchronize(streams[r]);
      equal_bits("all-reduce", std::vector<float>(memory[r], memory[r] + floats), sum);
      equal_bits("all-gather", std::vector<float>(all[r], all[r] + floats * size), together);
    }
  }
  // One rank alone: told to stop, it ends.
  cudaSetDevice(0);
  ranks[0]->all_reduce(memory[0], kMost, streams[0]);
  simt::when_stuck([&] { ranks[0]->abort(); });
  cudaStreamSynchronize(streams[0]);
  expect(ranks[0]->error() == "peer: told to stop waiting", ranks[0]->error().c_str(), 0);
  for (size_t r = 0; r < ranks.size(); r++)
    cudaStreamDestroy(streams[r]), cudaFree(memory[r]), cudaFree(all[r]);
  ranks.clear();
  if (failures == before) std::printf("ok %s\n", where.c_str());
}

/// A peer that never comes: the kernel ends, when it is told to or when it times out.
void test_absent(bool told) {
  where = told ? "told to stop waiting" : "a peer that never comes";
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int r = 0; r < 2; r++) ranks.push_back(std::make_unique<Rank>(kSmall, r, 2, 1, 64));
  join(ranks);
  Step in(kMostTokens, kMostTokens);
  set_step(in, {3}, kSmall.vocab);
  const int faults = simt::faults();
  simt::quiet(true);
  if (told) simt::when_stuck([&] { *ranks[0]->peers.abort = 1; });
  bool failed = false;
  try {
    ranks[0]->start(in, 1, 8);
    ranks[0]->backend.finish();
  } catch (const Error&) {
    failed = true;
  }
  simt::quiet(false);
  expect(failed && simt::faults() == faults + 1 && simt::last_fault().find("__trap") != std::string::npos,
         "the kernel ends itself", simt::faults() - faults);
  expect(*ranks[0]->peers.late == (told ? 0u : 2u), "and says who was late", *ranks[0]->peers.late);
  simt::reset();
  if (failed) std::printf("ok %s\n", where.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "";
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  const auto asked = [&](const char* name) { return part == name; };
  simt::seed(seed);
  random_state = static_cast<uint32_t>(seed);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const auto since = std::chrono::steady_clock::now();
  int expected_faults = 0;
  try {
    // Few, so that blocks have several units and 8 ranks not too many threads; the resident kernel wants one
    // for each token.
    const int extra = static_cast<int>(seed % 3);
    simt::processors(asked("ops") ? 2 + static_cast<int>(seed % 5) : (asked("many") ? 16 : 8) + extra);
    cpu = make_cpu_backend("generic", 1);
    gpu = std::make_unique<cuda::CudaBackend>(0);
    const auto of_seed = [&](const std::vector<int>& list, size_t i) {
      return list[(seed + i) % list.size()];
    };
    if (asked("ops")) check_quick();
    if (asked("stages")) {
      // Tiles are 32 positions of a sliding layer and 16 of a full one; the window is 40, its ring at
      // most 47. Neighbouring positions are of one sequence.
      const std::vector<std::vector<int>> steps = {
          {0}, {5, 31, 32, 64, 100}, {95, 47, 39, 3}, {40, 79, 80, 15}, {61, 62, 63, 64, 65, 66, 33}};
      for (size_t i = 0; i < steps.size(); i++)
        test_fused(kSmall, 2, 120, {steps[i]}, {of_seed({1, 2, 5, 8}, i)}, 1);
      ModelShape many = kSmall;
      many.experts = 21, many.top_k = of_seed({8, 5}, 0);
      test_choice(many, 1);
      // Long contexts: chunks of several tiles; more of them than the block that ends last joins.
      ModelShape wide = kSmall;
      wide.window = 600;
      test_fused(wide, 2, 4200, {{620, 621, 200}}, {of_seed({1, 2, 3}, 1)}, 1);
      test_fused(wide, 2, 4200, {{4100, 2047}}, {of_seed({1, 2}, 0)}, 1);
    }
    if (asked("stretches")) test_stretches(kSmall, 2, 120, {17, 70}, {of_seed({1, 3, 8}, 0)}, 1, 8);
    if (asked("ranks")) {
      test_ranks(kSmall, 2, 2, 120, {{0, 33}}, {of_seed({1, 3, 8}, 0)});
      test_ranks(kSmall, 2, 2, 120, {{100}}, {of_seed({1, 3, 8}, 1)});
      // More than two ranks are summed in tree order.
      ModelShape split = kSmall;
      split.leaves = split.heads = of_seed({4, 8}, 0), split.kv_heads = split.heads / 2;
      test_ranks(split, split.leaves, 1, 120, {{33}}, {of_seed({1, 3}, 1)});
      test_replay(kSmall, 1, 120, 3);
    }
    if (asked("many")) {  // more tokens than columns of a product
      ModelShape shape = kSmall;
      shape.experts = 21, shape.top_k = of_seed({8, 5}, 0);
      test_choice(shape, 2);
      test_fused(shape, 2, 120, {{40, 79, 80, 15, 61, 62, 63}}, {of_seed({9, 12, 16}, 0)}, 0);
      test_stretches(kSmall, 2, 120, {17, 70}, {of_seed({16, 11}, 0)}, 1, 64);
      test_ranks(kSmall, 2, 1, 120, {{0, 33}}, {of_seed({9, 16}, 0), 1, of_seed({13, 10}, 0)});
      // Eight leaves, and attention so wide that it is multiplied in four turns.
      shape.leaves = 8, shape.heads = 16, shape.kv_heads_full = 2, shape.period = 1;
      test_fused(shape, 1, 64, {{33, 50}}, {16}, 0);
    }
    if (asked("peers")) {
      for (const int size : {2, 4, 8}) test_peer(size);
      test_absent(true), test_absent(false);
      expected_faults = 2;
    }
  } catch (const Error& error) {
    expect(false, error.what(), 0);
  }
  gpu.reset();
  const int faults = simt::faults() - expected_faults;
  std::printf("seed %llu, %s: %d comparisons, %d failures, %d faults; %.1f million switches, %.1f s\n",
              static_cast<unsigned long long>(seed), part.c_str(), comparisons, failures, faults,
              static_cast<double>(simt::switches()) / 1e6,
              std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count());
  return failures > 0 || faults > 0 || comparisons == 0 ? 1 : 0;  // a part that there is not compares nothing
}
