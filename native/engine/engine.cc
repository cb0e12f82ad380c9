#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "engine/checks.h"

namespace tp {

namespace {

Dims dims_of(const EngineSpec& s) {
  Dims d{};
  d.hidden = s.model.hidden;
  d.vocab = s.model.vocab;
  d.local_vocab = s.model.vocab / s.size;
  d.inter = s.model.intermediate;
  d.moe_inter = s.model.moe_intermediate;
  d.experts = s.model.experts;
  d.top_k = s.model.top_k;
  d.all_leaves = s.model.leaves;
  d.leaves = s.model.leaves / s.size;
  d.rank = s.rank;
  d.size = s.size;
  d.candidates = s.limits.candidates;
  d.eps = static_cast<float>(s.model.eps);
  d.softcap = static_cast<float>(s.model.softcap);
  d.bfloat16 = s.dtype == "bfloat16";
  return d;
}

/// Steps of one key make the same calls.
uint64_t replay_key(size_t from, const Input& in, bool feed) {
  return (((static_cast<uint64_t>(from) << 20 | static_cast<uint64_t>(in.tokens)) << 20) |
          static_cast<uint64_t>(in.rows))
             << 1 |
         (feed ? 1 : 0);
}

}  // namespace

Engine::Engine(EngineSpec spec) : spec_(std::move(spec)) {
  check_spec(spec_);
  dims_ = dims_of(spec_);
  backend_ = spec_.device == "cuda" ? make_cuda_backend(spec_.device_index)
                                    : make_cpu_backend(spec_.isa.c_str(), spec_.threads);
  for (const LayerSpec& l : spec_.layers)
    backend_->require(dims_, {l.heads, l.kv_heads, l.head_dim, l.window, l.rotary_pairs});
  weights_ = std::make_unique<Weights>(spec_.tensors, *backend_, spec_.threads);
  buffers_ = std::make_unique<Buffers>(spec_, dims_, *backend_);
  inspector_ = std::make_unique<Inspector>(spec_, dims_, input_, batch_, *buffers_, *backend_);
  backend_->enter();  // the collective's memory belongs beside the weights
  const int64_t summary = int64_t{dims_.leaves} * (kSummaryFloats + kCandidateFloats * dims_.candidates);
  const int64_t most =
      std::max<int64_t>(int64_t{2} * dims_.hidden * spec_.limits.tokens, summary * spec_.limits.rows);
  if (spec_.collective == "peer") collective_ = make_peer(spec_.rank, spec_.size, most);
  if (spec_.collective == "nccl") collective_ = make_nccl(spec_.rank, spec_.size, most);
  stats_ = {weights_->bytes(), buffers_->cache_bytes, 0, 0};
}

Engine::~Engine() {
  if (!collective_) return;
  backend_->enter();
  collective_->abort();  // a peer may be gone: do not wait for it
}

DeviceCollective& Engine::collective() {
  if (!collective_) fail("TP_PLAN", "collective %s has nothing to join", spec_.collective.c_str());
  backend_->enter();
  return *collective_;
}

void Engine::abort() {
  if (collective_) collective_->abort();
}

std::string Engine::collective_error() const { return collective_ ? collective_->error() : ""; }

void Engine::prepare() {
  weights_->complete();
  program_ = std::make_unique<Program>(spec_, dims_, input_, *weights_, *buffers_, *backend_);
  fused_ = backend_->fuse(program_->decoder(), dims_, collective_ ? collective_->peers() : nullptr);
}

void Engine::begin(const Batch& batch) {
  check_batch(batch, spec_);
  batch_ = batch;
  trace_.clear();
  upload();
}

void Engine::upload() {
  // Fixed places, so that a recorded step finds its input: three arrays of T tokens, then seven of R rows.
  const auto t = static_cast<size_t>(spec_.limits.tokens), r = static_cast<size_t>(spec_.limits.rows);
  std::vector<uint32_t> packed(3 * t + 7 * r);
  size_t at = 0;
  const auto pack = [&](const auto& values, size_t room) {
    static_assert(sizeof values[0] == sizeof(uint32_t));
    // nothing lies nowhere: memcpy may not be given its address, not even for 0 bytes
    if (!values.empty()) std::memcpy(packed.data() + at, values.data(), values.size() * sizeof(uint32_t));
    uint32_t* const place = buffers_->input + at;
    at += room;
    return place;
  };
  const auto ints = [&](const std::vector<int>& values, size_t room) {
    return reinterpret_cast<int*>(pack(values, room));
  };
  const auto floats = [&](const std::vector<float>& values) {
    return reinterpret_cast<float*>(pack(values, r));
  };
  input_.tokens = static_cast<int>(batch_.tokens.size());
  input_.rows = static_cast<int>(batch_.rows.size());
  input_.token = ints(batch_.tokens, t);
  input_.position = ints(batch_.positions, t);
  input_.slot = ints(batch_.slots, t);
  input_.row = ints(batch_.rows, r);
  input_.target = ints(batch_.targets, r);
  input_.temperature = floats(batch_.temperature);
  input_.top_k = ints(batch_.top_k, r);
  input_.top_p = floats(batch_.top_p);
  input_.seed = pack(batch_.seed, r);
  input_.sequence = ints(batch_.sequence, r);
  backend_->write(buffers_->input, packed.data(), packed.size() * sizeof(uint32_t));
}

int Engine::run(int from) {
  if (!program_) fail("TP_PLAN", "run before prepare");
  if (input_.tokens == 0) fail("TP_BATCH", "run before begin");
  const auto& calls = program_->calls();
  const auto first = static_cast<size_t>(from);
  if (from < 0 || first > calls.size()) fail("TP_PLAN", "run from step %d of %zu", from, calls.size());
  backend_->enter();
  const bool host = spec_.collective == "host";
  // The step before `from` was a sync: its result is complete only now.
  if (host && first > 0 && calls[first - 1].sync != Program::Sync::none) inspect(calls[first - 1]);

  size_t to = first;
  while (to < calls.size() && !(host && calls[to].sync != Program::Sync::none)) to++;
  start_or_replay(first, to, false);
  backend_->finish();
  require_joined();
  if (to == calls.size()) count_reads();
  return static_cast<int>(to);
}

Engine::Burst Engine::decode(int steps) {
  if (!program_) fail("TP_PLAN", "decode before prepare");
  check_burst(batch_, spec_, steps);
  if (timer_) fail("TP_BATCH", "a burst while stages are timed");
  if (steps < 1 || steps > kHistory)
    fail("TP_BATCH", "a burst of %d steps; it takes 1 to %d", steps, kHistory);
  backend_->enter();
  const uint64_t first = *buffers_->fed_steps;
  for (int s = 0; s < steps; s++) start_or_replay(0, program_->calls().size(), true);
  backend_->finish();
  require_joined();

  const int rows = input_.rows;
  Burst burst{{}, {}, {}, rows};
  for (int s = 0; s < steps; s++) {
    const auto entry = static_cast<int64_t>((first + static_cast<uint64_t>(s)) % kHistory);
    const int64_t at = entry * spec_.limits.rows;
    burst.token.insert(burst.token.end(), buffers_->history_token + at, buffers_->history_token + at + rows);
    burst.logprob.insert(burst.logprob.end(), buffers_->history_logprob + at,
                         buffers_->history_logprob + at + rows);
    burst.end_ms.push_back(static_cast<double>(buffers_->history_ns[entry]) / 1e6);
    count_reads();
    for (size_t t = 0; t < batch_.tokens.size(); t++) {
      require_numbers(buffers_->history_token[at + static_cast<int64_t>(t)],
                      buffers_->history_logprob[at + static_cast<int64_t>(t)], t);
      batch_.tokens[t] = buffers_->history_token[at + static_cast<int64_t>(t)];
      batch_.positions[t]++;
    }
  }
  return burst;
}

void Engine::start_or_replay(size_t from, size_t to, bool feed) {
  if (fault_ || timer_ || spec_.trace || spec_.eager)
    start_step(from, to, feed);
  else
    backend_->replay(replay_key(from, input_, feed), [&] { start_step(from, to, feed); });
}

void Engine::start_step(size_t from, size_t to, bool feed) {
  const auto& calls = program_->calls();
  if (timer_) timer_->enter(from);
  if (from == 0)
    for (const AnglesArgs& rope : buffers_->ropes) backend_->ops().angles(rope, dims_, input_, *backend_);
  for (size_t i = from; i < to;) {
    const size_t first = i, fused_to = start_fused(i, to);
    if (fused_to > i) {
      i = fused_to;
    } else {
      start(calls[i]);
      i++;
    }
    if (timer_ && (calls[first].run || collective_)) timer_->leave(first, i, fused_to > first);
    inspect(calls[i - 1]);
  }
  if (to < calls.size()) return;
  backend_->ops().advance(
      {buffers_->expert_start, static_cast<int>(spec_.layers.size()), buffers_->experts_read, buffers_->token,
       buffers_->logprob, feed, const_cast<int*>(input_.token), const_cast<int*>(input_.position), kHistory,
       spec_.limits.rows, buffers_->history_token, buffers_->history_logprob, buffers_->history_ns,
       buffers_->fed_steps},
      dims_, input_, *backend_);
}

size_t Engine::start_fused(size_t from, size_t to) {
  const auto& calls = program_->calls();
  if (!fused_ || calls[from].stage_number < 0 || !fused_->takes(input_)) return from;
  // Whoever looks at every stage needs every stage by itself. A sync is fused with the stages on both its
  // sides.
  const bool alone = fault_ || spec_.trace, syncs = dims_.size == 1 || (collective_ && collective_->peers());
  size_t end = from + 1;
  while (!alone && end < to) {
    if (calls[end].stage_number >= 0)
      end++;
    else if (syncs && calls[end].sync == Program::Sync::all_reduce && end + 1 < to &&
             calls[end + 1].stage_number >= 0)
      end += 2;
    else
      break;
  }
  fused_->run(calls[from].stage_number, calls[end - 1].stage_number + 1, input_);
  return end;
}

void Engine::start(const Program::Call& call) {
  if (call.sync == Program::Sync::none) {
    call.run();
  } else if (collective_ && call.sync == Program::Sync::all_reduce) {
    collective_->all_reduce(static_cast<float*>(call.outputs[0].data), call.floats_per_token * input_.tokens,
                            backend_->stream_handle());
  } else if (collective_) {
    collective_->all_gather(buffers_->candidates, buffers_->gathered, call.floats_per_row * input_.rows,
                            backend_->stream_handle());
  }
}

void Engine::inspect(const Program::Call& call) {
  if (call.outputs.empty()) return;
  if (fault_) inspector_->add_fault(call, *fault_);
  if (spec_.trace) trace_.push_back(inspector_->trace(call));
}

void Engine::require_joined() const {
  const std::string error = collective_error();
  if (!error.empty()) fail("TP_COLLECTIVE", "%s", error.c_str());
}

void Engine::time_stages(bool on) {
  if (!program_) fail("TP_PLAN", "times of stages before prepare");
  backend_->enter();
  timer_ = nullptr;  // its end stops what a new one starts
  if (on) timer_ = std::make_unique<StageTimer>(*program_, *backend_, fused_.get());
}

StageTimer::Times Engine::stage_times() const {
  if (!timer_) fail("TP_PLAN", "times of stages that were not asked for");
  return timer_->times();
}

void Engine::fill_cache(int slot) {
  if (slot < 0 || slot >= spec_.limits.sequences)
    fail("TP_BATCH", "slot %d of %d", slot, spec_.limits.sequences);
  backend_->enter();
  const auto layers = static_cast<int>(spec_.layers.size());
  backend_->parallel(2 * layers, [&](int i, int) {
    const LayerSpec& layer = spec_.layers[static_cast<size_t>(i / 2)];
    const Cache& cache = buffers_->caches[static_cast<size_t>(i / 2)];
    // An fp32 number is two bfloat16 ones: the upper half decides, the lower are further digits.
    const uint64_t halves = (dims_.bfloat16 ? 1u : 2u) * static_cast<uint64_t>(layer.kv_heads) *
                            static_cast<uint64_t>(cache.capacity) * static_cast<uint64_t>(layer.head_dim);
    const uint64_t start = static_cast<uint64_t>(slot) * halves;
    const Synthetic source{{static_cast<uint32_t>(i), 0}, 1.0f / 65536, 0};
    backend_->ops().synthesize(source, {start, halves, halves, 1},
                               static_cast<Bf16*>(i % 2 == 0 ? cache.k : cache.v) + start, *backend_);
  });
  backend_->finish();
}

double Engine::cache_bytes_of(const Program::Call& call) const {
  if (!call.reads_cache) return 0;
  const LayerSpec& layer = spec_.layers[static_cast<size_t>(call.layer)];
  // Tokens of one sequence read the same keys: count the furthest of each slot once.
  std::vector<int> seen(static_cast<size_t>(spec_.limits.sequences), 0);
  for (size_t t = 0; t < batch_.tokens.size(); t++) {
    int& most = seen[static_cast<size_t>(batch_.slots[t])];
    most = std::max(most, batch_.positions[t] + 1);
  }
  double positions_read = 0;
  for (int positions : seen)
    positions_read += layer.window > 0 ? std::min(positions, layer.window) : positions;
  return 2 * positions_read * layer.kv_heads * layer.head_dim *
         static_cast<double>(dims_.bfloat16 ? sizeof(Bf16) : sizeof(float));
}

void Engine::count_reads() {
  for (const Program::Call& call : program_->calls())
    stats_.read_bytes += call.weight_bytes + cache_bytes_of(call);
}

std::vector<double> Engine::call_bytes() const {
  if (!program_) fail("TP_PLAN", "bytes of calls before prepare");
  const auto experts = static_cast<size_t>(dims_.experts);
  std::vector<int> start(spec_.layers.size() * (experts + 1));  // (layers, E + 1)
  backend_->read(start.data(), buffers_->expert_start, start.size() * sizeof(int));
  std::vector<double> bytes;
  for (const Program::Call& call : program_->calls()) {
    int distinct = 0;
    for (size_t e = 0; call.expert_bytes > 0 && e < experts; e++) {
      const int* const of_expert = &start[static_cast<size_t>(call.layer) * (experts + 1) + e];
      distinct += of_expert[1] > of_expert[0];
    }
    bytes.push_back(call.weight_bytes + cache_bytes_of(call) + distinct * call.expert_bytes);
  }
  return bytes;
}

void Engine::require_numbers(int token, float logprob, size_t row) const {
  const auto t = static_cast<size_t>(batch_.rows[row]);
  if (token >= dims_.vocab || std::isnan(logprob))
    fail("TP_NATIVE",
         "the logits behind position %d of slot %d are not numbers; do the weights hold NaN or infinity?",
         batch_.positions[t], batch_.slots[t]);
}

Engine::SyncBuffers Engine::sync_buffers(int index) const {
  if (!program_) fail("TP_PLAN", "sync buffers before prepare");
  const auto& calls = program_->calls();
  if (index < 0 || index >= static_cast<int>(calls.size()) ||
      calls[static_cast<size_t>(index)].sync == Program::Sync::none)
    fail("TP_PLAN", "step %d is no sync point", index);
  const Program::Call& call = calls[static_cast<size_t>(index)];
  if (call.sync == Program::Sync::all_reduce)
    return {static_cast<float*>(call.outputs[0].data), call.floats_per_token * input_.tokens, nullptr, 0};
  const int64_t floats = call.floats_per_row * input_.rows;
  return {buffers_->candidates, floats, buffers_->gathered, floats * dims_.size};
}

Engine::Result Engine::result() const {
  const auto rows = static_cast<size_t>(input_.rows);
  Result out{std::vector<int>(rows), std::vector<float>(rows), std::vector<float>(rows)};
  backend_->read(out.token.data(), buffers_->token, rows * sizeof(int));
  backend_->read(out.logprob.data(), buffers_->logprob, rows * sizeof(float));
  backend_->read(out.target_logprob.data(), buffers_->target_logprob, rows * sizeof(float));
  for (size_t r = 0; r < rows; r++) require_numbers(out.token[r], out.logprob[r], r);
  return out;
}

void Engine::logits(float* out) const {
  backend_->read(out, buffers_->logits, static_cast<size_t>(logits_floats()) * sizeof(float));
}

Stats Engine::take_stats() {
  uint64_t experts = 0;
  backend_->read(&experts, buffers_->experts_read, sizeof experts);
  const auto read = static_cast<double>(experts - experts_counted_);
  experts_counted_ = experts;
  double bytes = 0;  // of one expert of one layer: every layer's are alike
  if (program_ && !spec_.layers.empty())
    for (const Program::Call& call : program_->calls())
      bytes += call.expert_bytes / static_cast<double>(spec_.layers.size());
  Stats taken = stats_;
  taken.read_bytes += read * bytes;
  taken.experts_read = read;
  stats_.read_bytes = 0;
  return taken;
}

CollectiveBench::Times Engine::time_all_reduce(int64_t floats, int samples, int warmup, bool recorded) {
  DeviceCollective& joined = collective();
  if (!collective_bench_)
    collective_bench_ = std::make_unique<CollectiveBench>(*backend_, joined, spec_.rank, spec_.size);
  return collective_bench_->run(floats, samples, warmup, recorded);
}

double Engine::read_bandwidth(double seconds) {
  // Host threads take pieces; a device takes all at once.
  const auto total = static_cast<uint64_t>(weights_->bytes());
  const uint64_t piece = backend_->on_host() ? std::min(uint64_t{4} << 20, total) : total;
  const int pieces = static_cast<int>(total / piece);  // a last part is left out
  const auto* memory = static_cast<const char*>(weights_->memory());
  volatile uint64_t sink = 0;  // keeps the loads
  double bytes = 0;
  const auto start = std::chrono::steady_clock::now();
  std::chrono::duration<double> spent{};
  do {
    backend_->parallel(pieces, [&](int i, int) {
      sink = backend_->ops().stream(memory + static_cast<uint64_t>(i) * piece, piece, *backend_);
    });
    bytes += static_cast<double>(piece) * pieces;
    spent = std::chrono::steady_clock::now() - start;
  } while (spent.count() < seconds);
  return bytes / spent.count() / 1e9;
}

}  // namespace tp
