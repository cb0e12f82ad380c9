// What the addon exports: see interface Addon in src/native.ts.
#include <napi.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <sstream>
#include <thread>

#include "base/random.h"
#include "binding/bench_moe.h"
#include "binding/engine_wrap.h"
#include "comm/awake.h"
#include "comm/collective.h"
#include "comm/topology.h"
#include "engine/cores.h"
#include "ops/backend.h"

#ifndef TP_RUN_VERSION
#define TP_RUN_VERSION "0.0.0"
#endif

namespace tp {

namespace {

constexpr int kExitParentGone = 4;

Napi::Value version(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Array isas = Napi::Array::New(env);
  std::istringstream names(cpu_isas());
  for (std::string name; std::getline(names, name, ',');) isas.Set(isas.Length(), name);
  Napi::Object out = Napi::Object::New(env);
  out.Set("addon", TP_RUN_VERSION);
  out.Set("cuda", cuda_version() ? Napi::Value(Napi::String::New(env, cuda_version())) : env.Null());
  out.Set("isa", isas);
  return out;
}

Napi::Value cuda(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const CudaDevices found = cuda_devices();
  Napi::Array devices = Napi::Array::New(env);
  for (const CudaDevice& device : found.devices) {
    Napi::Object one = Napi::Object::New(env);
    one.Set("name", device.name);
    one.Set("computeCapability", std::to_string(device.major) + "." + std::to_string(device.minor));
    one.Set("freeBytes", device.free_bytes);
    one.Set("totalBytes", device.total_bytes);
    Napi::Array peers = Napi::Array::New(env);
    for (int peer : device.peers) peers.Set(peers.Length(), peer);
    one.Set("peers", peers);
    devices.Set(devices.Length(), one);
  }
  bool nccl_usable = false;
  const std::string nccl = nccl_version(nccl_usable);
  Napi::Object out = Napi::Object::New(env);
  out.Set("devices", devices);
  out.Set("why", found.why);
  out.Set("nccl", nccl_usable ? Napi::Value(Napi::String::New(env, nccl)) : env.Null());
  out.Set("ncclWhy", nccl_usable ? "" : nccl);
  return out;
}

template <class Value>
Napi::Array array_of(Napi::Env env, const std::vector<Value>& values) {
  Napi::Array out = Napi::Array::New(env, values.size());
  for (size_t i = 0; i < values.size(); i++) out.Set(static_cast<uint32_t>(i), values[i]);
  return out;
}

Napi::Value topology(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const GpuTopology found = gpu_topology();
  Napi::Array pairs = Napi::Array::New(env);
  for (const GpuPair& pair : found.pairs) {
    Napi::Object one = Napi::Object::New(env);
    one.Set("from", pair.from);
    one.Set("to", pair.to);
    one.Set("access", pair.access);
    one.Set("atomics", pair.atomics);
    pairs.Set(pairs.Length(), one);
  }
  Napi::Object out = Napi::Object::New(env);
  out.Set("driver", found.driver);
  out.Set("cuda", found.cuda);
  out.Set("why", found.why);
  out.Set("nvlinks", array_of(env, found.nvlinks));
  out.Set("pci", array_of(env, found.pci));
  out.Set("ipc", array_of(env, found.ipc));
  out.Set("pairs", pairs);
  return out;
}

/// A thread of its own, because the event loop may be inside a long call when the parent dies.
void watch_parent(const Napi::CallbackInfo& info) {
  const int fd = info[0].As<Napi::Number>().Int32Value();
  std::thread([fd] {
    for (;;) {
      char byte;
      const ssize_t got = read(fd, &byte, 1);
      if (got > 0 || (got < 0 && errno == EINTR)) continue;
      if (got < 0 && errno == EAGAIN) {  // Node makes its pipes non-blocking
        pollfd wait = {fd, POLLIN, 0};
        poll(&wait, 1, -1);
        continue;
      }
      _exit(kExitParentGone);
    }
  }).detach();
}

void awake(const Napi::CallbackInfo& info) { stay_awake(info[0].As<Napi::Number>().DoubleValue()); }

Napi::Value cores(const Napi::CallbackInfo& info) {
  const auto number = [&](size_t i) { return info[i].As<Napi::Number>().Int32Value(); };
  return Napi::Number::New(info.Env(), keep_to_cores(number(0), number(1), number(2)));
}

void synthesize(const Napi::CallbackInfo& info) {
  auto out = info[0].As<Napi::Uint16Array>();
  const auto start = static_cast<uint64_t>(info[1].As<Napi::Number>().Int64Value());
  const auto key = info[2].As<Napi::Array>();
  const Synthetic source = {
      {key.Get(0u).As<Napi::Number>().Uint32Value(), key.Get(1u).As<Napi::Number>().Uint32Value()},
      info[3].As<Napi::Number>().FloatValue(),
      info[4].As<Napi::Number>().FloatValue()};
  for (size_t i = 0; i < out.ElementLength(); i++) out[i] = synthetic_element(source, start + i);
}

Napi::Object initialise(Napi::Env env, Napi::Object exports) {
  exports.Set("Engine", define_engine(env));
  exports.Set("benchMoe", Napi::Function::New(env, start_bench_moe));
  exports.Set("cuda", Napi::Function::New(env, cuda));
  exports.Set("version", Napi::Function::New(env, version));
  exports.Set("watchParent", Napi::Function::New(env, watch_parent));
  exports.Set("topology", Napi::Function::New(env, topology));
  exports.Set("stayAwake", Napi::Function::New(env, awake));
  exports.Set("keepToCores", Napi::Function::New(env, cores));
  exports.Set("synthesize", Napi::Function::New(env, synthesize));
  return exports;
}

}  // namespace

}  // namespace tp

static Napi::Object Initialise(Napi::Env env, Napi::Object exports) { return tp::initialise(env, exports); }
NODE_API_MODULE(tp_run, Initialise)
