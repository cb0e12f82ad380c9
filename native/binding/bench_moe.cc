#include "binding/bench_moe.h"

#include <optional>

#include "base/check.h"
#include "binding/engine_wrap.h"
#include "ops/bench_moe.h"

namespace tp {

namespace {

class Worker final : public Napi::AsyncWorker {
 public:
  Worker(Napi::Env env, int device, MoeShape shape, std::vector<MoeCase> cases, int replays, uint32_t seed)
      : Napi::AsyncWorker(env),
        deferred(Napi::Promise::Deferred::New(env)),
        device_(device),
        shape_(shape),
        cases_(std::move(cases)),
        replays_(replays),
        seed_(seed) {}

  void Execute() override {
    try {
      bench_ = bench_moe(device_, shape_, cases_, replays_, seed_);
    } catch (const Error& error) {
      error_ = error;
    } catch (const std::exception& error) {
      error_ = Error("TP_NATIVE", error.what());
    }
  }
  void OnOK() override {
    const Napi::Env env = Env();
    if (error_) return deferred.Reject(to_js(env, *error_).Value());
    Napi::Array cases = Napi::Array::New(env);
    for (const MoeTimes& times : bench_.cases) {
      auto us = Napi::Float64Array::New(env, times.us.size());
      std::copy(times.us.begin(), times.us.end(), us.Data());
      Napi::Object one = Napi::Object::New(env);
      one.Set("us", us);
      one.Set("experts", times.experts);
      one.Set("bytes", times.bytes);
      one.Set("distance", times.distance);
      cases.Set(cases.Length(), one);
    }
    Napi::Object out = Napi::Object::New(env);
    out.Set("gpu", bench_.gpu);
    out.Set("readGbPerS", bench_.read_gb_per_s);
    out.Set("cases", cases);
    deferred.Resolve(out);
  }

  Napi::Promise::Deferred deferred;

 private:
  int device_;
  MoeShape shape_;
  std::vector<MoeCase> cases_;
  int replays_;
  uint32_t seed_;
  MoeBench bench_;
  std::optional<Error> error_;
};

}  // namespace

Napi::Value start_bench_moe(const Napi::CallbackInfo& info) {
  const auto spec = info[0].As<Napi::Object>();
  const auto number = [&](const char* name) { return spec.Get(name).As<Napi::Number>().Int32Value(); };
  const MoeShape shape{number("hidden"), number("width"), number("experts"), number("topK"),
                       number("leaves")};
  std::vector<MoeCase> cases;
  const auto list = spec.Get("cases").As<Napi::Array>();
  for (uint32_t i = 0; i < list.Length(); i++) {
    const auto one = list.Get(i).As<Napi::Object>();
    cases.push_back({one.Get("variant").As<Napi::String>().Utf8Value(),
                     one.Get("tokens").As<Napi::Number>().Int32Value()});
  }
  auto* const worker = new Worker(info.Env(), number("deviceIndex"), shape, std::move(cases),
                                  number("replays"), spec.Get("seed").As<Napi::Number>().Uint32Value());
  const Napi::Value promise = worker->deferred.Promise();
  worker->Queue();  // it deletes itself
  return promise;
}

}  // namespace tp
