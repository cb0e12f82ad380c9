#pragma once

#include <napi.h>

#include "base/check.h"

namespace tp {

/// The Engine class of src/native.ts.
Napi::Function define_engine(Napi::Env env);

/// A JavaScript Error with the native error's code.
Napi::Error to_js(Napi::Env env, const Error& error);

}  // namespace tp
