#pragma once

#include <napi.h>

namespace tp {

/// benchMoe of src/native.ts: a promise, settled from a thread of Node's pool.
Napi::Value start_bench_moe(const Napi::CallbackInfo& info);

}  // namespace tp
