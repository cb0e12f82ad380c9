// What every instruction of native/base/ptx.cuh means on the host. An instruction that is missing here does
// not compile in the emulated build.
#pragma once

#include <cstring>

#include "base/dtype.h"
#include "cuda_runtime.h"

namespace tp::ptx {

// ---- shared memory

#define TP_DYNAMIC_SHARED(type, name, align) \
  type* const name = reinterpret_cast<type*>(simt::dynamic_shared(align))

inline uint32_t shared_address(const void* p) { return simt::shared_address(p); }
inline uint32_t ld_shared(uint32_t at) {
  uint32_t x;
  std::memcpy(&x, simt::shared_memory(at, sizeof x), sizeof x);
  return x;
}
inline void st_shared(uint32_t at, uint32_t x) {
  std::memcpy(simt::shared_memory(at, sizeof x), &x, sizeof x);
}
inline uint4 ld_shared_v4(uint32_t at) {
  uint4 x;
  std::memcpy(&x, simt::shared_memory(at, 16), sizeof x);
  return x;
}
inline uint4 ld_shared_v4(uint32_t at, bool wanted) { return wanted ? ld_shared_v4(at) : uint4{}; }

// ---- barriers of threads

inline void bar_sync(int id, int threads) { simt::barrier_wait(id, threads); }
template <int Id, int Threads>
void bar_sync() {
  simt::barrier_wait(Id, Threads);
}
template <int Id, int Threads>
void bar_arrive() {
  simt::barrier_arrive(Id, Threads);
}

template <int>
void keep_registers() {}
template <int>
void take_registers() {}

// ---- mbarriers

inline void mbarrier_init(uint32_t barrier, int arrivals) { simt::mbarrier_init(barrier, arrivals); }
template <int Arrivals>
void mbarrier_init(uint32_t barrier) {
  simt::mbarrier_init(barrier, Arrivals);
}
inline void mbarrier_arrive(uint32_t barrier) { simt::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) { simt::mbarrier_arrive(barrier, bytes); }
inline uint32_t mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  return simt::mbarrier_try_wait(barrier, parity);
}

// ---- fences: memory has one order here

inline void fence_proxy_async() {}
inline void fence_mbarrier_init() {}

// ---- copies of a thread

inline void cp_async_8(uint32_t to, const void* from) { simt::copy_async(to, from, 8, 8); }
inline void cp_async_16(uint32_t to, const void* from) { simt::copy_async(to, from, 16, 16); }
inline void cp_async_16(uint32_t to, const void* from, int bytes) { simt::copy_async(to, from, bytes, 16); }
inline void cp_async_commit() { simt::copy_async_commit(); }
template <int Pending>
void cp_async_wait() {
  simt::copy_async_wait(Pending);
}
inline void cp_async_wait_all() { simt::copy_async_wait_all(); }
inline void cp_async_mbarrier_arrive(uint32_t barrier) { simt::copy_async_arrive(barrier); }

// ---- copies by the copy engine

inline uint64_t evict_first_policy() { return 0; }
inline void cp_async_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t) {
  simt::copy_bulk(to, from, bytes, barrier);
}
inline void cp_async_bulk_tensor(uint32_t to, const void* map, int x, int y, uint32_t barrier, uint64_t = 0) {
  simt::copy_box(to, map, x, y, 0, barrier);
}
inline void cp_async_bulk_tensor_3d(uint32_t to, const void* map, int x, int y, int z, uint32_t barrier) {
  simt::copy_box(to, map, x, y, z, barrier);
}

// ---- tensor cores

inline void mma_m16n8k16(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1) {
  simt::MmaOperands x{acc, {a0, a1, a2, a3}, {b0, b1}};
  simt::collective(simt::Op::mma16, ~0u, reinterpret_cast<uintptr_t>(&x));
}
inline void mma_m16n8k8(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  simt::MmaOperands x{acc, {a0, a1, 0, 0}, {b0, 0}};
  simt::collective(simt::Op::mma8, ~0u, reinterpret_cast<uintptr_t>(&x));
}
struct LdmatrixOperands {
  const char* row;
  uint32_t* out;
};
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  LdmatrixOperands x{simt::shared_memory(row, 16), r};
  simt::collective(simt::Op::ldmatrix, ~0u, reinterpret_cast<uintptr_t>(&x));
}
inline void ldmatrix_x2(uint32_t& low, uint32_t& high, uint32_t row) {
  uint32_t r[4];
  ldmatrix_x4(r, row);
  low = r[0], high = r[1];
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  LdmatrixOperands x{simt::shared_memory(row, 16), r};
  simt::collective(simt::Op::ldmatrix_trans, ~0u, reinterpret_cast<uintptr_t>(&x));
}

// ---- global memory

inline void prefetch_l2(const void*) {}
inline uint2 ld_global_nc_v2(const void* from) { return *static_cast<const uint2*>(from); }
inline uint32_t ld_acquire_gpu(const uint32_t* from) {
  simt::load_shared_with_others(from);
  return *static_cast<const volatile uint32_t*>(from);
}
template <int Value>
void red_release_gpu_add(uint32_t* to) {
  simt::maybe_pause();
  *to += Value;
  simt::changed();
}
inline uint32_t atom_acq_rel_gpu_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
inline void st_relaxed_gpu(float* to, float value) { simt::store_late(to, &value, 4); }
inline uint4 ld_relaxed_gpu_v4(const void* from) {
  simt::load_shared_with_others(from);
  const auto* const x = static_cast<const volatile uint32_t*>(from);
  return make_uint4(x[0], x[1], x[2], x[3]);
}
inline void st_relaxed_sys_b128(void* to, uint64_t low, uint64_t high) {
  const uint64_t both[2] = {low, high};
  simt::store_late(to, both, 16);
}
inline void ld_relaxed_sys_b128(uint64_t& low, uint64_t& high, const void* from) {
  simt::load_shared_with_others(from);
  low = static_cast<const volatile uint64_t*>(from)[0];
  high = static_cast<const volatile uint64_t*>(from)[1];
}

// ---- kernels after each other

inline void griddepcontrol_wait() { simt::grid_wait(); }
inline void griddepcontrol_launch_dependents() { simt::grid_launch_dependents(); }

// ---- the rest

inline uint64_t globaltimer() { return simt::clock_ns(); }
inline float rsqrt_approx(float x) { return 1 / std::sqrt(x); }
inline float ex2_approx(float x) { return std::exp2(x); }
inline uint32_t cvt_rn_bf16x2(float low, float high) {
  return to_bf16(low) | static_cast<uint32_t>(to_bf16(high)) << 16;
}

}  // namespace tp::ptx
