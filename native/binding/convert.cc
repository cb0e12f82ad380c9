#include "binding/convert.h"

#include <cmath>

namespace tp {

namespace {

[[noreturn]] void wrong(const char* name, const char* expected) {
  fail("TP_PLAN", "expected %s for '%s'", expected, name);
}

Napi::Array list(const Napi::Object& from, const char* name) {
  const Napi::Value value = field(from, name);
  if (!value.IsArray()) wrong(name, "an array");
  return value.As<Napi::Array>();
}

Napi::Object object(const Napi::Object& from, const char* name) {
  const Napi::Value value = field(from, name);
  if (!value.IsObject()) wrong(name, "an object");
  return value.As<Napi::Object>();
}

bool boolean(const Napi::Object& from, const char* name) {
  const Napi::Value value = field(from, name);
  if (!value.IsBoolean()) wrong(name, "a boolean");
  return value.As<Napi::Boolean>();
}

std::vector<int64_t> sizes(const Napi::Object& from, const char* name) {
  const Napi::Array array = list(from, name);
  std::vector<int64_t> out;
  for (uint32_t i = 0; i < array.Length(); i++) {
    const Napi::Value value = array.Get(i);
    if (!value.IsNumber()) wrong(name, "whole numbers");
    out.push_back(value.As<Napi::Number>().Int64Value());
  }
  return out;
}

template <class Array, class Element>
std::vector<Element> typed(const Napi::Object& from, const char* name, napi_typedarray_type type,
                           const char* expected) {
  const Napi::Value value = field(from, name);
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != type) wrong(name, expected);
  const auto array = value.As<Array>();
  return std::vector<Element>(array.Data(), array.Data() + array.ElementLength());
}

std::vector<int> ints(const Napi::Object& from, const char* name) {
  return typed<Napi::Int32Array, int>(from, name, napi_int32_array, "an Int32Array");
}

std::vector<float> floats(const Napi::Object& from, const char* name) {
  return typed<Napi::Float32Array, float>(from, name, napi_float32_array, "a Float32Array");
}

StepSpec to_step(const Napi::Object& from) {
  StepSpec step{text(from, "op"), text(from, "stage"), integer(from, "layer"), {}, ""};
  const Napi::Object weights = object(from, "weights");
  const Napi::Array roles = weights.GetPropertyNames();
  for (uint32_t i = 0; i < roles.Length(); i++) {
    const std::string role = roles.Get(i).As<Napi::String>();
    step.weights[role] = text(weights, role.c_str());
  }
  if (from.Has("buffer")) step.buffer = text(from, "buffer");
  return step;
}

}  // namespace

Napi::Value field(const Napi::Object& from, const char* name) { return from.Get(name); }

double number(const Napi::Object& from, const char* name) {
  const Napi::Value value = field(from, name);
  if (!value.IsNumber()) wrong(name, "a number");
  return value.As<Napi::Number>().DoubleValue();
}

int integer(const Napi::Object& from, const char* name) {
  const double value = number(from, name);
  if (value != std::floor(value) || std::abs(value) > 2147483647.0) wrong(name, "a 32-bit whole number");
  return static_cast<int>(value);
}

std::string text(const Napi::Object& from, const char* name) {
  const Napi::Value value = field(from, name);
  if (!value.IsString()) wrong(name, "a string");
  return value.As<Napi::String>();
}

EngineSpec to_spec(const Napi::Object& from) {
  EngineSpec spec{};
  spec.device = text(from, "device");
  spec.dtype = text(from, "dtype");
  spec.collective = text(from, "collective");
  spec.isa = text(from, "isa");
  spec.threads = integer(from, "threads");
  spec.rank = integer(from, "rank");
  spec.size = integer(from, "size");
  spec.device_index = integer(from, "deviceIndex");
  spec.trace = boolean(from, "trace");
  spec.eager = from.Has("eager") && boolean(from, "eager");
  const Napi::Object model = object(from, "model");
  spec.model = {integer(model, "hidden"),          integer(model, "vocab"),   integer(model, "intermediate"),
                integer(model, "moeIntermediate"), integer(model, "experts"), integer(model, "topK"),
                integer(model, "leaves"),          number(model, "eps"),      number(model, "softcap"),
                number(model, "embedScale")};
  const Napi::Object limits = object(from, "limits");
  spec.limits = {integer(limits, "tokens"), integer(limits, "rows"), integer(limits, "sequences"),
                 integer(limits, "positions"), integer(limits, "candidates")};
  const Napi::Array layers = list(from, "layers"), tensors = list(from, "tensors"),
                    steps = list(from, "steps");
  for (uint32_t i = 0; i < layers.Length(); i++) {
    const auto layer = layers.Get(i).As<Napi::Object>();
    spec.layers.push_back({integer(layer, "heads"), integer(layer, "kvHeads"), integer(layer, "headDim"),
                           integer(layer, "window"), boolean(layer, "kEqV"), number(layer, "ropeTheta"),
                           integer(layer, "rotaryPairs")});
  }
  for (uint32_t i = 0; i < tensors.Length(); i++) {
    const auto tensor = tensors.Get(i).As<Napi::Object>();
    spec.tensors.push_back({text(tensor, "name"), sizes(tensor, "shape")});
  }
  for (uint32_t i = 0; i < steps.Length(); i++)
    spec.steps.push_back(to_step(steps.Get(i).As<Napi::Object>()));
  return spec;
}

Slice to_slice(const Napi::Object& from) {
  Slice slice{sizes(from, "shape"), sizes(from, "start"), sizes(from, "stop")};
  if (slice.shape.empty() || slice.start.size() != slice.shape.size() ||
      slice.stop.size() != slice.shape.size())
    wrong("slice", "shape, start and stop of one length");
  return slice;
}

Batch to_batch(const Napi::Object& from) {
  return {ints(from, "tokens"),
          ints(from, "positions"),
          ints(from, "slots"),
          ints(from, "rows"),
          ints(from, "targets"),
          ints(from, "topK"),
          ints(from, "sequence"),
          floats(from, "temperature"),
          floats(from, "topP"),
          typed<Napi::Uint32Array, uint32_t>(from, "seed", napi_uint32_array, "a Uint32Array")};
}

Fault to_fault(const Napi::Object& from) {
  return {text(from, "stage"), integer(from, "layer"), integer(from, "position"), integer(from, "slot")};
}

}  // namespace tp
