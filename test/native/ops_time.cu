// Times the CUDA ops and the whole step at the real shape, on a GPU: ops_time [time [many]] [moe] [profile]
// [profile-fused] [time-fused [POSITION]].
#include "ops/bench_moe.h"
#include "test/native/ops_support.h"

using namespace tp;
using namespace tp::test;

namespace {

double read_gb_per_s = 0;  // of a plain read kernel

/// What a kernel reaches that only reads, once the clocks are up.
void measure_read() {
  constexpr uint64_t kBytes = 2ull << 30;
  auto* const memory = gpu->allocate(kBytes);
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  for (int i = 0; i < 50; i++) {
    cudaEventRecord(start, gpu->stream());
    gpu->ops().stream(memory, kBytes, *gpu);
    cudaEventRecord(stop, gpu->stream());
    cuda::check(cudaEventSynchronize(stop), "a plain read");
    float ms;
    cudaEventElapsedTime(&ms, start, stop);
    read_gb_per_s = std::max(read_gb_per_s, kBytes / 1e6 / double{ms});
  }
  cudaEventDestroy(start), cudaEventDestroy(stop);
  std::printf("read kernel: %.0f GB/s\n", read_gb_per_s);
}

/// Microseconds of `work`, recorded as a graph: the median of several replays of `inner` runs each.
double microseconds(const std::function<void()>& work, int inner, int repeats = 15) {
  work();
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cuda::check(cudaStreamBeginCapture(gpu->stream(), cudaStreamCaptureModeThreadLocal), "capture");
  work();
  cuda::check(cudaStreamEndCapture(gpu->stream(), &graph), "capture");
  cuda::check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  std::vector<float> times;
  for (int i = 0; i < repeats + 3; i++) {
    cudaEventRecord(start, gpu->stream());
    cuda::check(cudaGraphLaunch(exec, gpu->stream()), "launch");
    cudaEventRecord(stop, gpu->stream());
    cuda::check(cudaEventSynchronize(stop), "a timed run");
    float ms;
    cudaEventElapsedTime(&ms, start, stop);
    if (i >= 3) times.push_back(ms);
  }
  cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaEventDestroy(start), cudaEventDestroy(stop);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1000.0 / inner;
}

void report(const char* name, int size, int T, double us, double bytes) {
  std::printf("%-12s TP=%d T=%d  %9.2f us  %8.1f MB  %7.0f GB/s  %5.1f %%\n", name, size, T, us, bytes / 1e6,
              bytes / us / 1e3, bytes / us / 1e3 / read_gb_per_s * 100);
  std::fflush(stdout);
}

void time_all(int layer_count, const std::vector<int>& batches, const std::vector<int>& sizes) {
  const int most = batches.back();
  for (const int size : sizes) {
    gpu.reset();
    gpu = std::make_unique<cuda::CudaBackend>(0);
    const int positions = 1100;
    Model m(size, layer_count, most, positions, most);
    for (const int T : batches) {
      Step in(most, most);
      for (int t = 0; t < most; t++) {
        in.token.host[t] = static_cast<int>(random_bits() % 262144), in.position.host[t] = 100,
        in.slot.host[t] = t, in.row.host[t] = t;
        in.target.host[t] = -1, in.temperature.host[t] = 0, in.top_k.host[t] = 0, in.top_p.host[t] = 1,
        in.seed.host[t] = 1;
        in.sequence.host[t] = t;
      }
      in.upload();
      const Input input = in.device(T, T);
      const Ops& ops = gpu->ops();
      ops.embed(m.embed, m.d, input, *gpu);
      double expert_bytes = 0, fixed = 0, experts = 0;
      const double expert = 3.0 * 2 * 2816 * m.d.moe_inter, mlp = 3.0 * 2 * 2816 * m.d.inter;
      for (const Layer& l : m.layers) {
        m.layer(l, input);
        const int n = m.distinct(l);
        experts += n;
        expert_bytes += n * expert;
        fixed += l.qkv_bytes + l.out_bytes + mlp + 2.0 * 128 * 2816;
      }
      std::vector<float> hidden(T * 2816);
      gpu->read(hidden.data(), m.layers[0].qkv.hidden, hidden.size() * sizeof(float));
      double square = 0;
      for (const float x : hidden) square += double(x) * x;
      const double head_bytes = 2.0 * 2816 * m.d.local_vocab;
      std::printf("-- TP=%d T=%d: %.1f distinct experts a layer, hidden rms %.3f\n", size, T,
                  experts / m.layers.size(), std::sqrt(square / hidden.size()));
      // Ops one by one: 5 sliding layers in turn, so that no weights stay in the cache. Routing is the last
      // layer's.
      const double routed = m.distinct(m.layers.back());
      const auto each = [&](const char* name, double bytes, const std::function<void(const Layer&)>& op,
                            bool full = false) {
        std::vector<const Layer*> some;
        for (int l = 0; l < static_cast<int>(m.layers.size()); l++)
          if ((l % 6 == 5) == full && some.size() < 5) some.push_back(&m.layers[static_cast<size_t>(l)]);
        const double us = microseconds(
            [&] {
              for (int r = 0; r < 4; r++)
                for (const Layer* l : some) op(*l);
            },
            4 * static_cast<int>(some.size()));
        report(name, size, T, us, bytes);
      };
      each("qkv", m.layers[0].qkv_bytes, [&](const Layer& l) { ops.qkv(l.qkv, m.d, input, *gpu); });
      each(
          "qkv full", m.layers[5].qkv_bytes, [&](const Layer& l) { ops.qkv(l.qkv, m.d, input, *gpu); }, true);
      each("attention", 0, [&](const Layer& l) { ops.attention(l.attention, m.d, input, *gpu); });
      each("attn full", 0, [&](const Layer& l) { ops.attention(l.attention, m.d, input, *gpu); }, true);
      each("attn_out", m.layers[0].out_bytes,
           [&](const Layer& l) { ops.attn_out(l.attn_out, m.d, input, *gpu); });
      each(
          "out full", m.layers[5].out_bytes,
          [&](const Layer& l) { ops.attn_out(l.attn_out, m.d, input, *gpu); }, true);
      each("gate_up", mlp * 2 / 3 + routed * expert * 2 / 3,
           [&](const Layer& l) { ops.gate_up(l.gate_up, m.d, input, *gpu); });
      each("down", mlp / 3 + routed * expert / 3,
           [&](const Layer& l) { ops.down(l.down, m.d, input, *gpu); });
      each("moe pair", mlp + routed * expert, [&](const Layer& l) {
        ops.gate_up(l.gate_up, m.d, input, *gpu);
        ops.down(l.down, m.d, input, *gpu);
      });
      each("ffn_out", 0, [&](const Layer& l) { ops.ffn_out(l.ffn_out, m.d, input, *gpu); });
      each("route", 2.0 * 128 * 2816, [&](const Layer& l) { ops.route(l.route, m.d, input, *gpu); });
      report("logits", size, T, microseconds([&] { ops.logits(m.logits, m.d, input, *gpu); }, 1), head_bytes);
      if (size == 1)
        report("sample", size, T, microseconds([&] { ops.sample(m.sample, m.d, input, *gpu); }, 1), 0);
      const auto step = [&] {
        ops.embed(m.embed, m.d, input, *gpu);
        for (const Layer& l : m.layers) m.layer(l, input);
        ops.logits(m.logits, m.d, input, *gpu);
        if (size == 1) ops.sample(m.sample, m.d, input, *gpu);
      };
      for (const bool overlap : {true, false}) {
        gpu->overlap = overlap;
        report(overlap ? "STEP" : "step, no PDL", size, T, microseconds(step, 1, 31),
               fixed + expert_bytes + head_bytes);
      }
      gpu->overlap = true;
    }
  }
}

/// A few short steps, for a profiler.
void profile_fused() {
  Model m(2, 6, 8, 1100, 8);
  set_angles(m);
  const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
  Step in(8, 8);
  set_step(in, {100});
  for (int i = 0; i < 3; i++) fused->run(0, 6 * 7 + 1, in.device(1, 1));
  gpu->finish();
}

/// Where a whole step goes: microseconds of each stage in sliding and full layers, from the last block's end
/// of the stage before to its own, and until the last block had its inputs, and later ones where a stage has
/// such.
void report_stages(Fused& fused, int layer_count, const Input& input) {
  const int stages = layer_count * 7 + 1, blocks = fused.blocks();
  std::vector<uint64_t> marks(static_cast<size_t>(blocks) * stages * 4);
  auto* const on_gpu = static_cast<uint64_t*>(gpu->allocate(marks.size() * sizeof(uint64_t)));
  const char* const names[] = {"qkv", "attention", "attn_out", "route", "gate_up", "down", "ffn_out"};
  constexpr int kRuns = 9;
  double took[2][7] = {}, until[2][2][7] = {}, whole = 0;
  fused.measure(on_gpu);
  for (int run = 0; run <= kRuns; run++) {
    fused.run(0, stages, input);
    gpu->read(marks.data(), on_gpu, marks.size() * sizeof(uint64_t));
    if (run == 0) continue;
    const auto last = [&](int stage, int mark) {
      uint64_t most = 0;
      for (int b = 0; b < blocks; b++)
        most = std::max(most, marks[(static_cast<size_t>(b) * stages + stage) * 4 + mark]);
      return most;
    };
    for (int s = 1; s < stages - 1; s++) {
      const uint64_t begin = last(s - 1, 3);
      took[s / 7 % 6 == 5][s % 7] += static_cast<double>(last(s, 3) - begin);
      for (const int mark : {1, 2})
        until[mark - 1][s / 7 % 6 == 5][s % 7] +=
            std::max(0.0, static_cast<double>(last(s, mark)) - static_cast<double>(begin));
    }
    whole += static_cast<double>(last(stages - 1, 3) - last(0, 3));
  }
  fused.measure(nullptr);
  const double full = layer_count / 6, sliding = layer_count - full;
  for (int s = 0; s < 7; s++)
    std::printf("  %-10s sliding %6.2f us (inputs %5.2f, later ones %5.2f)  full %6.2f us (%5.2f, %5.2f)\n",
                names[s], took[0][s] / sliding / kRuns / 1e3, until[0][0][s] / sliding / kRuns / 1e3,
                until[1][0][s] / sliding / kRuns / 1e3, took[1][s] / full / kRuns / 1e3,
                until[0][1][s] / full / kRuns / 1e3, until[1][1][s] / full / kRuns / 1e3);
  std::printf("  behind the first stage %.0f us\n", whole / kRuns / 1e3);
}

/// `position`: of all tokens.
void time_fused(int layer_count, int position) {
  const int stages = layer_count * 7 + 1;
  for (const int size : {1, 2}) {
    gpu.reset();
    gpu = std::make_unique<cuda::CudaBackend>(0);
    Model m(size, layer_count, 8, std::max(1100, position + 100), 8);
    set_angles(m);
    // As one rank: what it would add to its peers' sums it adds to nothing.
    const auto fused = gpu->fuse(decoder_of(m), m.d, nullptr);
    Step in(8, 8);
    for (const int T : {1, 2, 4, 8}) {
      set_step(in, {position});
      const Input input = in.device(T, T);
      gpu->ops().embed(m.embed, m.d, input, *gpu);
      fused->run(0, stages, input);
      double bytes = 2.0 * 2816 * m.d.local_vocab;
      for (const Layer& l : m.layers) {
        fused->run(0, 7, input);
        bytes += l.qkv_bytes + l.out_bytes + 2.0 * 128 * 2816 +
                 (m.d.inter + m.distinct(l) * static_cast<double>(m.d.moe_inter)) * 3.0 * 2 * 2816;
      }
      const double us = microseconds([&] { fused->run(0, stages, input); }, 1, 31);
      report("FUSED", size, T, us, bytes);
      if (size == 2 && (T == 1 || T == 8)) report_stages(*fused, layer_count, input);
    }
  }
}

/// Batches above 8, and a prompt of 2,048 tokens in one step.
void time_many(int layer_count) {
  time_all(layer_count, {16, 32, 64}, {2});
  constexpr int kPrompt = 2048;
  for (const int size : {2, 1}) {
    gpu.reset();
    gpu = std::make_unique<cuda::CudaBackend>(0);
    Model m(size, layer_count, kPrompt, kPrompt + 64, 1);
    Step in(kPrompt, 1);
    for (int t = 0; t < kPrompt; t++)
      in.token.host[t] = static_cast<int>(random_bits() % 262144), in.position.host[t] = t,
      in.slot.host[t] = 0;
    in.row.host[0] = kPrompt - 1, in.target.host[0] = -1, in.temperature.host[0] = 0, in.top_k.host[0] = 0;
    in.top_p.host[0] = 1, in.seed.host[0] = 1, in.sequence.host[0] = 0;
    in.upload();
    const Input input = in.device(kPrompt, 1);
    const Ops& ops = gpu->ops();
    ops.embed(m.embed, m.d, input, *gpu);
    for (const Layer& l : m.layers) m.layer(l, input);
    std::printf("-- TP=%d, a prompt of %d tokens\n", size, kPrompt);
    const auto each = [&](const char* name, double gflop, const std::function<void(const Layer&)>& op,
                          bool full = false) {
      std::vector<const Layer*> some;
      for (int l = 0; l < static_cast<int>(m.layers.size()); l++)
        if ((l % 6 == 5) == full && some.size() < 3) some.push_back(&m.layers[static_cast<size_t>(l)]);
      const double us = microseconds(
          [&] {
            for (const Layer* l : some) op(*l);
          },
          static_cast<int>(some.size()), 5);
      std::printf("%-12s TP=%d  %9.1f us  %7.1f TFLOP/s\n", name, size, us, gflop / us * 1e3);
      std::fflush(stdout);
    };
    const double matrix = 2.0 * kPrompt * 2816 * 1e-9;  // GFLOP for one weight row of H
    const auto run = [&](bool full) {
      const Layer& l = m.layers[full ? 5 : 0];
      const double columns = l.attn_out.columns;
      each(
          full ? "qkv full" : "qkv", l.qkv_bytes / 2 / 2816 * matrix,
          [&](const Layer& x) { ops.qkv(x.qkv, m.d, input, *gpu); }, full);
      // Of all scores half are seen, or a window of 1,024.
      const double pairs = full ? 0.5 * kPrompt * kPrompt : 1024.0 * (kPrompt - 512);
      each(
          full ? "attn full" : "attention", 4 * pairs * columns * 1e-9,
          [&](const Layer& x) { ops.attention(x.attention, m.d, input, *gpu); }, full);
      each(
          full ? "out full" : "attn_out", columns * matrix,
          [&](const Layer& x) { ops.attn_out(x.attn_out, m.d, input, *gpu); }, full);
    };
    run(false), run(true);
    each("route", 128 * matrix, [&](const Layer& x) { ops.route(x.route, m.d, input, *gpu); });
    const double wide = m.d.inter + 8.0 * m.d.moe_inter;
    each("gate_up", 2 * wide * matrix, [&](const Layer& x) { ops.gate_up(x.gate_up, m.d, input, *gpu); });
    each("down", wide * matrix, [&](const Layer& x) { ops.down(x.down, m.d, input, *gpu); });
    each("ffn_out", 0, [&](const Layer& x) { ops.ffn_out(x.ffn_out, m.d, input, *gpu); });
    const double us = microseconds(
        [&] {
          ops.embed(m.embed, m.d, input, *gpu);
          for (const Layer& l : m.layers) m.layer(l, input);
          ops.logits(m.logits, m.d, input, *gpu);
        },
        1, 5);
    std::printf("PROMPT       TP=%d  %9.1f us without all-reduces\n", size, us);
    std::fflush(stdout);
  }
}

/// The experts alone, by all variants.
void time_moe() {
  gpu.reset();
  for (const int width : {352, 704}) {
    std::vector<MoeCase> cases;
    for (const int T : {1, 2, 4, 8, 16, 32, 64})
      for (const char* variant : {"published", "grouped", "auto"}) cases.push_back({variant, T});
    MoeBench bench = bench_moe(0, {2816, width, 128, 8, width / 88}, cases, 30, 7);
    std::printf("-- experts of %d columns, read kernel %.0f GB/s\n", width, bench.read_gb_per_s);
    for (size_t i = 0; i < cases.size(); i++) {
      MoeTimes& x = bench.cases[i];
      std::sort(x.us.begin(), x.us.end());
      const double us = x.us[x.us.size() / 2];
      std::printf("moe N=%d T=%-2d %-9s %8.1f us  %5.0f GB/s  %5.2f x floor  distance %.1e\n", width,
                  cases[i].tokens, cases[i].variant.c_str(), us, x.bytes / us / 1e3,
                  us / (x.bytes / bench.read_gb_per_s / 1e3), x.distance);
    }
  }
  gpu = std::make_unique<cuda::CudaBackend>(0);
}

/// A layer of 16, of 32 and of 2,048 tokens, for a profiler.
void profile_many() {
  for (const int T : {16, 32, 2048}) {
    gpu.reset();
    gpu = std::make_unique<cuda::CudaBackend>(0);
    Model m(2, 1, T, 2112, T > 64 ? 1 : T);
    Step in(T, 1);
    for (int t = 0; t < T; t++) {
      in.token.host[t] = static_cast<int>(random_bits() % 262144);
      in.position.host[t] = T > 64 ? t : 100, in.slot.host[t] = T > 64 ? 0 : t;
    }
    in.row.host[0] = 0;
    in.upload();
    const Input input = in.device(T, 1);
    gpu->ops().embed(m.embed, m.d, input, *gpu);
    m.layer(m.layers[0], input);
    gpu->finish();
  }
}

}  // namespace
int main(int argc, char** argv) {
  try {
    gpu = std::make_unique<cuda::CudaBackend>(0);
    measure_read();
    const auto asked = [&](const char* what) {
      for (int i = 1; i < argc; i++)
        if (std::string(argv[i]) == what) return true;
      return argc == 1;
    };
    const bool named = argc > 1;
    if (named && asked("profile")) profile_many();
    if (named && asked("moe")) time_moe();
    if (asked("time")) {
      if (named && asked("many"))
        time_many(30);
      else
        time_all(30, {1, 2, 4, 8}, {1, 2});
    }
    const int last = std::atoi(argv[argc - 1]);
    if (asked("time") || asked("time-fused")) time_fused(30, last > 0 ? last : 100);
    if (named && asked("profile-fused")) profile_fused();
    gpu.reset();
  } catch (const Error& error) {
    std::printf("FAIL %s: %s\n", error.code().c_str(), error.what());
    return 1;
  }
  return 0;
}
