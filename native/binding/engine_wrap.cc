// The Engine class of src/native.ts. Work runs on the engine's own thread, one call after another; the main
// thread only converts. Off-thread code touches plain C++ values alone.
#include "binding/engine_wrap.h"

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "binding/convert.h"
#include "engine/engine.h"

namespace tp {

Napi::Error to_js(Napi::Env env, const Error& error) {
  Napi::Error js = Napi::Error::New(env, error.what());
  js.Set("code", Napi::String::New(env, error.code()));
  return js;
}

namespace {

/// Runs `work`; what it throws comes out as a JavaScript error with its code.
template <class Work>
auto guarded(Napi::Env env, Work&& work) {
  try {
    return work();
  } catch (const Error& error) {
    throw to_js(env, error);
  }
}

class EngineWrap;

/// One call on its way: computed on the engine's thread, settled on the main thread.
struct Task {
  explicit Task(Napi::Env env) : deferred(Napi::Promise::Deferred::New(env)) {}
  using Answer = std::function<Napi::Value(Napi::Env)>;
  std::function<Answer()> work;  // an empty answer resolves with undefined
  Answer answer;
  std::optional<Error> error;
  Napi::Promise::Deferred deferred;
};

Task::Answer number_answer(double value) {
  return [value](Napi::Env env) { return Napi::Number::New(env, value); };
}

template <class Array, class Element>
Array typed_array(Napi::Env env, const std::vector<Element>& values) {
  auto array = Array::New(env, values.size());
  std::copy(values.begin(), values.end(), array.Data());
  return array;
}

void settle(Napi::Env env, Napi::Function, EngineWrap* engine, Task* task);

class EngineWrap : public Napi::ObjectWrap<EngineWrap> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "Engine",
                       {
                           InstanceMethod<&EngineWrap::synthesize>("synthesize"),
                           InstanceMethod<&EngineWrap::read_tensor>("readTensor"),
                           InstanceMethod<&EngineWrap::prepare>("prepare"),
                           InstanceMethod<&EngineWrap::begin>("begin"),
                           InstanceMethod<&EngineWrap::run>("run"),
                           InstanceMethod<&EngineWrap::decode>("decode"),
                           InstanceMethod<&EngineWrap::collective_hello>("collectiveHello"),
                           InstanceMethod<&EngineWrap::join_collective>("joinCollective"),
                           InstanceMethod<&EngineWrap::sync_buffers>("syncBuffers"),
                           InstanceMethod<&EngineWrap::result>("result"),
                           InstanceMethod<&EngineWrap::logits>("logits"),
                           InstanceMethod<&EngineWrap::read_buffer>("readBuffer"),
                           InstanceMethod<&EngineWrap::write_buffer>("writeBuffer"),
                           InstanceMethod<&EngineWrap::trace>("trace"),
                           InstanceMethod<&EngineWrap::plant_fault>("plantFault"),
                           InstanceMethod<&EngineWrap::stats>("stats"),
                           InstanceMethod<&EngineWrap::time_stages>("timeStages"),
                           InstanceMethod<&EngineWrap::stage_times>("stageTimes"),
                           InstanceMethod<&EngineWrap::fill_cache>("fillCache"),
                           InstanceMethod<&EngineWrap::read_bandwidth>("readBandwidth"),
                           InstanceMethod<&EngineWrap::time_all_reduce>("timeAllReduce"),
                           InstanceMethod<&EngineWrap::collective_error>("collectiveError"),
                           InstanceMethod<&EngineWrap::abort>("abort"),
                           InstanceMethod<&EngineWrap::close>("close"),
                       });
  }

  explicit EngineWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<EngineWrap>(info) {
    const Napi::Env env = info.Env();
    engine_ = guarded(env, [&] { return std::make_unique<Engine>(to_spec(info[0].As<Napi::Object>())); });
    settle_ = Settle::New(
        env, "tp-run engine", 0, 1, this,
        [way = way_](Napi::Env, void*, EngineWrap*) {
          const std::lock_guard<std::mutex> lock(way->mutex);
          way->gone = true;
        },
        static_cast<void*>(nullptr));
    settle_.Unref(env);  // an idle engine does not keep the process alive; a pending call does, see submit()
    thread_ = std::thread([this] { loop(); });
  }

  ~EngineWrap() override { stop(); }

  /// A call is settled; main thread.
  void leave(Napi::Env env) {
    if (--pending_ == 0 && engine_) settle_.Unref(env);
    Unref();
  }

 private:
  using Settle = Napi::TypedThreadSafeFunction<EngineWrap, Task, settle>;

  Napi::Value submit(Napi::Env env, std::function<Task::Answer()> work) {
    open(env);
    auto task = std::make_unique<Task>(env);
    task->work = std::move(work);
    const Napi::Value promise = task->deferred.Promise();
    if (pending_++ == 0) settle_.Ref(env);
    Ref();  // whoever drops the engine still gets the answer
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(task));
    }
    ready_.notify_one();
    return promise;
  }

  void loop() {
    for (;;) {
      std::unique_ptr<Task> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;
        task = std::move(queue_.front());
        queue_.pop_front();
      }
      try {
        task->answer = task->work();
      } catch (const Error& error) {
        task->error = error;
      } catch (const std::exception& error) {
        task->error = Error("TP_NATIVE", error.what());
      }
      const std::lock_guard<std::mutex> lock(way_->mutex);
      if (!way_->gone && settle_.NonBlockingCall(task.get()) == napi_ok) task.release();
    }
  }

  void stop() {
    if (!thread_.joinable()) return;
    if (pending_ > 0 && engine_) engine_->abort();  // whoever still waits for a peer has nobody to tell
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    ready_.notify_one();
    thread_.join();
    if (!way_->gone) settle_.Release();
  }

  void open(Napi::Env env) const {
    if (!engine_) throw to_js(env, Error("TP_NATIVE", "the engine is closed"));
  }

  /// Open, and its thread is not at work: what the main thread now reads and writes is its own.
  void idle(Napi::Env env) const {
    open(env);
    if (pending_ > 0)
      throw to_js(env, Error("TP_NATIVE", "the engine is still at work; await its last call"));
  }

  Napi::Value synthesize(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const std::string name = info[0].As<Napi::String>();
      const Slice slice = to_slice(info[1].As<Napi::Object>());
      const auto key = info[2].As<Napi::Array>();
      const Synthetic source = {
          {key.Get(0u).As<Napi::Number>().Uint32Value(), key.Get(1u).As<Napi::Number>().Uint32Value()},
          info[3].As<Napi::Number>().FloatValue(),
          info[4].As<Napi::Number>().FloatValue()};
      return submit(info.Env(), [this, name, slice, source] {
        engine_->weights().synthesize(name, slice, source);
        return Task::Answer();
      });
    });
  }

  Napi::Value read_tensor(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const std::string name = info[0].As<Napi::String>();
      const Slice slice = to_slice(info[1].As<Napi::Object>());
      const int fd = info[2].As<Napi::Number>().Int32Value();
      const int64_t offset = info[3].As<Napi::Number>().Int64Value();
      return submit(info.Env(), [this, name, slice, fd, offset] {
        engine_->weights().read(name, slice, fd, offset);
        return Task::Answer();
      });
    });
  }

  Napi::Value prepare(const Napi::CallbackInfo& info) {
    return submit(info.Env(), [this] {
      engine_->prepare();
      return Task::Answer();
    });
  }

  void begin(const Napi::CallbackInfo& info) {
    idle(info.Env());
    guarded(info.Env(), [&] { engine_->begin(to_batch(info[0].As<Napi::Object>())); });
  }

  Napi::Value run(const Napi::CallbackInfo& info) {
    const int from = info[0].As<Napi::Number>().Int32Value();
    return submit(info.Env(), [this, from] { return number_answer(engine_->run(from)); });
  }

  Napi::Value decode(const Napi::CallbackInfo& info) {
    const int steps = info[0].As<Napi::Number>().Int32Value();
    return submit(info.Env(), [this, steps]() -> Task::Answer {
      return [burst = engine_->decode(steps)](Napi::Env env) {
        Napi::Object out = Napi::Object::New(env);
        out.Set("tokens", typed_array<Napi::Int32Array>(env, burst.token));
        out.Set("logprobs", typed_array<Napi::Float32Array>(env, burst.logprob));
        out.Set("endMs", typed_array<Napi::Float64Array>(env, burst.end_ms));
        return out;
      };
    });
  }

  Napi::Value collective_hello(const Napi::CallbackInfo& info) {
    idle(info.Env());
    return guarded(info.Env(),
                   [&] { return typed_array<Napi::Uint8Array>(info.Env(), engine_->collective().hello()); });
  }

  Napi::Value join_collective(const Napi::CallbackInfo& info) {
    const auto list = info[0].As<Napi::Array>();
    std::vector<std::vector<uint8_t>> hellos;
    for (uint32_t i = 0; i < list.Length(); i++) {
      const auto bytes = list.Get(i).As<Napi::Uint8Array>();
      hellos.emplace_back(bytes.Data(), bytes.Data() + bytes.ElementLength());
    }
    const double timeout_s = info[1].As<Napi::Number>().DoubleValue() / 1000;
    return submit(info.Env(), [this, hellos, timeout_s] {
      engine_->collective().connect(hellos, timeout_s);
      return Task::Answer();
    });
  }

  /// A Float32Array over the engine's own memory. One ArrayBuffer per address: V8 forbids two over the same
  /// memory.
  Napi::Value view(Napi::Env env, float* memory, int64_t floats) {
    auto& [reference, room] = views_[memory];
    if (reference.IsEmpty() || room < floats) {
      if (!reference.IsEmpty()) reference.Value().Detach();
      reference =
          Napi::Persistent(Napi::ArrayBuffer::New(env, memory, static_cast<size_t>(floats) * sizeof(float)));
      room = floats;
    }
    return Napi::Float32Array::New(env, static_cast<size_t>(floats), reference.Value(), 0);
  }

  Napi::Value sync_buffers(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    idle(env);
    return guarded(env, [&] {
      const Engine::SyncBuffers sync = engine_->sync_buffers(info[0].As<Napi::Number>().Int32Value());
      Napi::Object out = Napi::Object::New(env);
      out.Set("send", view(env, sync.send, sync.send_floats));
      out.Set("gathered", sync.gathered ? view(env, sync.gathered, sync.gathered_floats) : env.Null());
      return out;
    });
  }

  Napi::Value result(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    idle(env);
    const Engine::Result r = guarded(env, [&] { return engine_->result(); });
    Napi::Object out = Napi::Object::New(env);
    out.Set("tokens", typed_array<Napi::Int32Array>(env, r.token));
    out.Set("logprobs", typed_array<Napi::Float32Array>(env, r.logprob));
    out.Set("targetLogprobs", typed_array<Napi::Float32Array>(env, r.target_logprob));
    return out;
  }

  Napi::Value logits(const Napi::CallbackInfo& info) {
    idle(info.Env());
    const auto floats = static_cast<size_t>(engine_->logits_floats());
    auto out = Napi::Float32Array::New(info.Env(), floats);
    engine_->logits(out.Data());
    return out;
  }

  Napi::Value read_buffer(const Napi::CallbackInfo& info) {
    idle(info.Env());
    return guarded(info.Env(), [&] {
      const std::vector<float> values = engine_->inspector().read(info[0].As<Napi::String>());
      auto out = Napi::Float32Array::New(info.Env(), values.size());
      std::copy(values.begin(), values.end(), out.Data());
      return out;
    });
  }

  void write_buffer(const Napi::CallbackInfo& info) {
    idle(info.Env());
    guarded(info.Env(), [&] {
      if (!info[1].IsTypedArray() || info[1].As<Napi::TypedArray>().TypedArrayType() != napi_float32_array)
        fail("TP_PLAN", "expected a Float32Array to write");
      const auto values = info[1].As<Napi::Float32Array>();
      engine_->inspector().write(info[0].As<Napi::String>(), values.Data(), values.ElementLength());
    });
  }

  Napi::Value trace(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    idle(env);
    const auto& entries = engine_->trace();
    Napi::Array out = Napi::Array::New(env, entries.size());
    for (size_t i = 0; i < entries.size(); i++) {
      const TraceEntry& entry = entries[i];
      auto hashes = Napi::BigUint64Array::New(env, entry.hashes.size());
      std::copy(entry.hashes.begin(), entry.hashes.end(), hashes.Data());
      Napi::Object object = Napi::Object::New(env);
      object.Set("stage", entry.stage);
      object.Set("layer", entry.layer);
      object.Set("parts", entry.parts);
      object.Set("sharded", entry.sharded);
      object.Set("hashes", hashes);
      out.Set(static_cast<uint32_t>(i), object);
    }
    return out;
  }

  void plant_fault(const Napi::CallbackInfo& info) {
    idle(info.Env());
    guarded(info.Env(), [&] {
      engine_->plant_fault(info[0].IsObject() ? std::optional<Fault>(to_fault(info[0].As<Napi::Object>()))
                                              : std::nullopt);
    });
  }

  Napi::Value stats(const Napi::CallbackInfo& info) {
    idle(info.Env());
    const Stats stats = engine_->take_stats();
    Napi::Object out = Napi::Object::New(info.Env());
    out.Set("weightBytes", stats.weight_bytes);
    out.Set("cacheBytes", stats.cache_bytes);
    out.Set("readBytes", stats.read_bytes);
    out.Set("expertsRead", stats.experts_read);
    return out;
  }

  Napi::Value time_stages(const Napi::CallbackInfo& info) {
    const bool on = info[0].As<Napi::Boolean>();
    return submit(info.Env(), [this, on] {
      engine_->time_stages(on);
      return Task::Answer();
    });
  }

  Napi::Value stage_times(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    idle(env);
    return guarded(env, [&] {
      const StageTimer::Times times = engine_->stage_times();
      Napi::Object out = Napi::Object::New(env);
      out.Set("spans", typed_array<Napi::Float64Array>(env, times.spans));
      out.Set("bytes", typed_array<Napi::Float64Array>(env, engine_->call_bytes()));
      out.Set("blocks", typed_array<Napi::Int32Array>(env, times.blocks));
      out.Set("marks", typed_array<Napi::Float64Array>(env, times.marks));
      return out;
    });
  }

  Napi::Value fill_cache(const Napi::CallbackInfo& info) {
    const int slot = info[0].As<Napi::Number>().Int32Value();
    return submit(info.Env(), [this, slot] {
      engine_->fill_cache(slot);
      return Task::Answer();
    });
  }

  Napi::Value read_bandwidth(const Napi::CallbackInfo& info) {
    const double seconds = info[0].As<Napi::Number>().DoubleValue();
    return submit(info.Env(), [this, seconds] { return number_answer(engine_->read_bandwidth(seconds)); });
  }

  Napi::Value time_all_reduce(const Napi::CallbackInfo& info) {
    const int64_t floats = info[0].As<Napi::Number>().Int64Value();
    const int samples = info[1].As<Napi::Number>().Int32Value();
    const int warmup = info[2].As<Napi::Number>().Int32Value();
    const bool graph = info[3].As<Napi::Boolean>();
    return submit(info.Env(), [this, floats, samples, warmup, graph]() -> Task::Answer {
      return [times = engine_->time_all_reduce(floats, samples, warmup, graph)](Napi::Env env) {
        Napi::Object out = Napi::Object::New(env);
        out.Set("timesUs", typed_array<Napi::Float64Array>(env, times.us));
        out.Set("wrong", times.wrong);
        return out;
      };
    });
  }

  Napi::Value collective_error(const Napi::CallbackInfo& info) {
    return Napi::String::New(info.Env(), engine_ ? engine_->collective_error() : "");
  }

  void abort(const Napi::CallbackInfo&) {
    if (engine_) engine_->abort();
  }

  void close(const Napi::CallbackInfo&) {
    stop();
    for (auto& [memory, entry] : views_)
      if (!entry.first.IsEmpty()) entry.first.Value().Detach();
    views_.clear();
    engine_.reset();
  }

  std::unique_ptr<Engine> engine_;
  std::map<float*, std::pair<Napi::Reference<Napi::ArrayBuffer>, int64_t>> views_;
  /// Node takes the way back to the main thread down on its own when the process ends, perhaps before us.
  struct Way {
    std::mutex mutex;
    bool gone = false;
  };
  const std::shared_ptr<Way> way_ = std::make_shared<Way>();
  Settle settle_;
  int pending_ = 0;  // calls not settled yet; main thread
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::unique_ptr<Task>> queue_;
  bool stopping_ = false;
  std::thread thread_;
};

void settle(Napi::Env env, Napi::Function, EngineWrap* engine, Task* task) {
  const std::unique_ptr<Task> owned(task);
  if (env == nullptr) return;  // the environment is going down
  engine->leave(env);
  if (task->error)
    task->deferred.Reject(to_js(env, *task->error).Value());
  else
    task->deferred.Resolve(task->answer ? task->answer(env) : env.Undefined());
}

}  // namespace

Napi::Function define_engine(Napi::Env env) { return EngineWrap::define(env); }

}  // namespace tp
