// JavaScript values to the plain C++ values of engine/spec.h. Wrong types are TP_PLAN with the name of the
// field.
#pragma once

#include <napi.h>

#include <string>
#include <vector>

#include "base/check.h"
#include "engine/spec.h"

namespace tp {

EngineSpec to_spec(const Napi::Object& from);
Slice to_slice(const Napi::Object& from);
Batch to_batch(const Napi::Object& from);
Fault to_fault(const Napi::Object& from);

Napi::Value field(const Napi::Object& from, const char* name);
double number(const Napi::Object& from, const char* name);
int integer(const Napi::Object& from, const char* name);
std::string text(const Napi::Object& from, const char* name);

}  // namespace tp
