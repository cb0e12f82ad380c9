#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/bench_moe.h"
#include "ops/cuda/grouped/grouped.h"
#include "ops/cuda/published_moe.cuh"
#include "ops/cuda/stream.h"

namespace tp {

namespace cuda {

namespace {

constexpr int kBlocks = 16;  // of one recording
constexpr int kSets = 2;     // of weights, by turns; more than a cache holds even of few experts

/// A step's routing: every token chooses top_k different experts, all equally likely.
struct Routing {
  int *index, *start, *assignment;  // (T, K), (E + 1), (T * K)
  float* weight;                    // (T, K)
  int distinct;
};

class Bench {
 public:
  Bench(int device, const MoeShape& shape, int most_tokens, uint32_t seed)
      : gpu_(device), shape_(shape), random_(seed) {
    const auto s = [](int x) { return static_cast<size_t>(x); };
    const size_t rows = s(most_tokens), wide = rows * s(shape.top_k) * s(shape.width);
    for (int i = 0; i < kSets; i++) {
      gate_up_[i] = weights(s(shape.experts) * 2 * s(shape.width) * s(shape.hidden), shape.hidden);
      down_[i] = weights(s(shape.experts) * s(shape.hidden) * s(shape.width), shape.width * shape.leaves);
    }
    none_ = weights(s(8) * s(shape.hidden), shape.hidden);
    in_ = memory<float>(rows * s(shape.hidden));
    projected_ = memory<float>(2 * wide), act_ = memory<float>(wide);
    sum_ = memory<float>(rows * 2 * s(shape.hidden)), out_ = memory<Bf16>(rows * s(shape.hidden));
    std::vector<float> in(rows * s(shape.hidden));
    for (float& x : in) x = round_to(true, 2 * uniform() - 1);
    gpu_.write(in_, in.data(), in.size() * sizeof(float));
  }

  double read_gb_per_s() {
    const auto bytes = sizeof(Bf16) * static_cast<uint64_t>(shape_.experts) * 2 *
                       static_cast<uint64_t>(shape_.width) * static_cast<uint64_t>(shape_.hidden);
    auto* const sum = memory<unsigned long long>(1);
    std::vector<double> us;
    for (int i = 0; i < 200; i++)  // the first find the clocks still low
      us.push_back(timed([&] { start_stream(gate_up_[i % kSets], bytes, sum, gpu_); }));
    return static_cast<double>(bytes) / *std::min_element(us.begin(), us.end()) / 1e3;
  }

  MoeTimes time(const MoeCase& c, int replays) {
    std::vector<Routing> routings;
    for (int i = 0; i < kBlocks; i++) routings.push_back(route(c.tokens));
    MoeTimes out{};
    for (const Routing& r : routings) out.experts += static_cast<double>(r.distinct) / kBlocks;
    out.bytes = out.experts * 3 * sizeof(Bf16) * shape_.width * shape_.hidden;
    run("auto", c.tokens, routings[0], 0);
    const std::vector<float> expected = sums(c.tokens, "auto");
    run(c.variant, c.tokens, routings[0], 0);
    out.distance = distance(sums(c.tokens, c.variant), expected);

    check(cudaStreamBeginCapture(gpu_.stream(), cudaStreamCaptureModeThreadLocal), "recording");
    for (int i = 0; i < kBlocks; i++) run(c.variant, c.tokens, routings[static_cast<size_t>(i)], i % kSets);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t recorded = nullptr;
    check(cudaStreamEndCapture(gpu_.stream(), &graph), "recording");
    check(cudaGraphInstantiate(&recorded, graph, 0), "recording");
    for (int i = -3; i < replays; i++) {
      const double us = timed([&] { check(cudaGraphLaunch(recorded, gpu_.stream()), "starting"); });
      if (i >= 0) out.us.push_back(us / kBlocks);
    }
    cudaGraphExecDestroy(recorded), cudaGraphDestroy(graph);
    return out;
  }

 private:
  template <class T>
  T* memory(size_t count) {
    return static_cast<T*>(gpu_.allocate(count * sizeof(T)));
  }
  Bf16* weights(size_t count, int summed) {
    auto* const out = memory<Bf16>(count);
    const float scale = std::sqrt(3.0f / static_cast<float>(summed)) / 32767;
    const Synthetic source{{mix32(next_++), next_}, to_float(to_bf16(scale)), 0};
    gpu_.ops().synthesize(source, {0, count, 0, 1}, out, gpu_);
    return out;
  }
  float uniform() { return static_cast<float>(mix32(random_++) >> 8) / 16777216.0f; }

  Routing route(int tokens) {
    const int k = shape_.top_k, all = tokens * k;
    std::vector<int> index, start(static_cast<size_t>(shape_.experts) + 1),
        assignment(static_cast<size_t>(all));
    std::vector<float> weight;
    for (int t = 0; t < tokens; t++) {
      std::vector<int> experts(static_cast<size_t>(shape_.experts));
      std::iota(experts.begin(), experts.end(), 0);
      for (int i = 0; i < k; i++) {
        const int other = i + static_cast<int>(uniform() * static_cast<float>(shape_.experts - i));
        std::swap(experts[static_cast<size_t>(i)], experts[static_cast<size_t>(other)]);
        index.push_back(experts[static_cast<size_t>(i)]);
        weight.push_back((0.5f + uniform()) / static_cast<float>(k));
      }
    }
    std::iota(assignment.begin(), assignment.end(), 0);
    const auto expert = [&](int a) { return index[static_cast<size_t>(a)]; };
    std::stable_sort(assignment.begin(), assignment.end(),
                     [&](int a, int b) { return expert(a) < expert(b); });
    for (const int e : index)
      for (size_t i = static_cast<size_t>(e) + 1; i < start.size(); i++) start[i]++;
    Routing r{memory<int>(index.size()), memory<int>(start.size()), memory<int>(assignment.size()),
              memory<float>(weight.size()), 0};
    for (size_t e = 0; e + 1 < start.size(); e++) r.distinct += start[e + 1] > start[e];
    gpu_.write(r.index, index.data(), index.size() * sizeof(int));
    gpu_.write(r.start, start.data(), start.size() * sizeof(int));
    gpu_.write(r.assignment, assignment.data(), assignment.size() * sizeof(int));
    gpu_.write(r.weight, weight.data(), weight.size() * sizeof(float));
    return r;
  }

  /// One block.
  void run(const std::string& variant, int tokens, const Routing& r, int set) {
    if (variant == "published") {
      published::run({in_, gate_up_[set], down_[set], r.index, r.weight, projected_, act_, sum_, out_, tokens,
                      shape_.top_k, shape_.hidden, shape_.width},
                     gpu_.stream());
      return;
    }
    Dims d{};  // inter 0: no dense MLP
    d.hidden = shape_.hidden, d.moe_inter = shape_.width, d.experts = shape_.experts;
    d.top_k = shape_.top_k, d.leaves = d.all_leaves = shape_.leaves, d.size = 1, d.bfloat16 = true;
    const bool grouped = variant == "grouped" || grouped::chosen(d, tokens);
    Input in{};
    in.tokens = tokens;
    const GateUpArgs first{in_, in_, none_, none_, gate_up_[set], r.start, r.assignment, nullptr, act_};
    const DownArgs second{nullptr, act_, r.weight, none_, down_[set], r.start, r.assignment, sum_};
    if (grouped) {
      if (!grouped::fits(first, d) || !grouped::fits(second, d))
        fail("TP_LIMIT", "the grouped kernels cannot cut experts of %d columns", shape_.width);
      grouped::gate_up(first, d, in, gpu_);
      grouped::down(second, d, in, gpu_);
    } else {
      gpu_.ops().gate_up(first, d, in, gpu_);
      gpu_.ops().down(second, d, in, gpu_);
    }
  }
  /// The experts' output of the last block.
  std::vector<float> sums(int tokens, const std::string& variant) {
    const bool published = variant == "published";
    const size_t h = static_cast<size_t>(shape_.hidden), rows = static_cast<size_t>(tokens);
    std::vector<float> all(rows * h * (published ? 1 : 2)), out;
    gpu_.read(all.data(), sum_, all.size() * sizeof(float));
    if (published) return all;
    for (size_t t = 0; t < rows; t++)
      out.insert(out.end(), all.begin() + static_cast<std::ptrdiff_t>((2 * t + 1) * h),
                 all.begin() + static_cast<std::ptrdiff_t>((2 * t + 2) * h));
    return out;
  }
  static double distance(const std::vector<float>& a, const std::vector<float>& b) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < a.size(); i++)
      difference += std::pow(double{a[i]} - double{b[i]}, 2), size += double{b[i]} * double{b[i]};
    return std::sqrt(difference / size);
  }
  template <class Work>
  double timed(Work&& work) {
    cudaEvent_t start, stop;
    check(cudaEventCreate(&start), "timing"), check(cudaEventCreate(&stop), "timing");
    cudaEventRecord(start, gpu_.stream());
    work();
    cudaEventRecord(stop, gpu_.stream());
    check(cudaEventSynchronize(stop), "a timed run");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    cudaEventDestroy(start), cudaEventDestroy(stop);
    return 1e3 * static_cast<double>(ms);
  }

  CudaBackend gpu_;
  MoeShape shape_;
  uint32_t random_, next_ = 1;
  Bf16 *gate_up_[kSets], *down_[kSets];  // (E, 2 N, H), (E, H, N)
  Bf16* none_;                           // (8, H): stands where a dense MLP would
  float *in_, *projected_, *act_, *sum_;
  Bf16* out_;
};

}  // namespace

}  // namespace cuda

MoeBench bench_moe(int device, const MoeShape& shape, const std::vector<MoeCase>& cases, int replays,
                   uint32_t seed) {
  if (shape.width % 8 || shape.hidden % 8)
    fail("TP_LIMIT", "experts of %d columns of %d; the benchmark takes multiples of 8", shape.width,
         shape.hidden);
  int most = 1;
  for (const MoeCase& c : cases) most = std::max(most, c.tokens);
  cuda::Bench bench(device, shape, most, seed);
  cudaDeviceProp properties;
  cuda::check(cudaGetDeviceProperties(&properties, device), "asking for the GPU's properties");
  MoeBench out{properties.name, bench.read_gb_per_s(), {}};
  for (const MoeCase& c : cases) out.cases.push_back(bench.time(c, replays));
  return out;
}

}  // namespace tp
