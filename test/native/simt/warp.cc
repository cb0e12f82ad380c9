// Collectives of a warp: lanes that come leave what they give, and the last one works out what each gets.
#include <cstring>

#include "fibers.h"

namespace simt {

namespace {

const char* const kOpNames[] = {
    "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",
    "__shfl_xor_sync",   "__ballot_sync",     "__all_sync",        "__any_sync",
    "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync", "__match_any_sync",
    "mma.m16n8k16",      "mma.m16n8k8",       "ldmatrix",          "ldmatrix.trans"};

float bf16(uint32_t bits) {
  float value;
  bits <<= 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// acc += a times b, `halves` times 8 elements. Sums in fp32, element after element; the hardware's order and
/// its rounding inside are its own.
void multiply(Warp& warp, int halves) {
  float a[16][16], b[16][8];
  bool low_only = true;
  const MmaOperands* all[32];
  for (int lane = 0; lane < 32; lane++) {
    const auto& x = *(all[lane] = reinterpret_cast<const MmaOperands*>(warp.value[lane]));
    const int row = lane / 4, k = lane % 4 * 2;
    for (int half = 0; half < halves; half++) {
      for (int i = 0; i < 2; i++) {
        const uint32_t pair = x.a[2 * half + i];
        a[row + 8 * i][8 * half + k] = bf16(pair), a[row + 8 * i][8 * half + k + 1] = bf16(pair >> 16);
        if (i == 1 && pair) low_only = false;
      }
      b[8 * half + k][row] = bf16(x.b[half]), b[8 * half + k + 1][row] = bf16(x.b[half] >> 16);
    }
  }
  for (int row = 0; row < (low_only ? 8 : 16); row++) {
    float sums[8] = {};
    for (int k = 0; k < 8 * halves; k++)
      for (int column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
    for (int q = 0; q < 4; q++) {
      float* const acc = all[row % 8 * 4 + q]->acc + (row < 8 ? 0 : 2);
      acc[0] += sums[2 * q], acc[1] += sums[2 * q + 1];
    }
  }
}

struct LdmatrixOperands {
  const char* row;
  uint32_t* out;
};

void load_matrices(const Warp& warp, bool transposed) {
  for (int lane = 0; lane < 32; lane++) {
    uint32_t* const out = reinterpret_cast<const LdmatrixOperands*>(warp.value[lane])->out;
    for (int matrix = 0; matrix < 4; matrix++) {
      const auto row = [&](int r) {
        return reinterpret_cast<const LdmatrixOperands*>(warp.value[matrix * 8 + r])->row;
      };
      if (!transposed) {
        std::memcpy(&out[matrix], row(lane / 4) + lane % 4 * 4, 4);
        continue;
      }
      uint16_t pair[2];
      for (int i = 0; i < 2; i++) std::memcpy(&pair[i], row(lane % 4 * 2 + i) + lane / 4 * 2, 2);
      std::memcpy(&out[matrix], pair, 4);
    }
  }
}

/// What every lane of the mask gets.
void complete(Warp& warp, Op op, uint32_t mask) {
  switch (op) {
    case Op::syncwarp:
      return;
    case Op::mma16:
    case Op::mma8:
      return multiply(warp, op == Op::mma16 ? 2 : 1);
    case Op::ldmatrix:
    case Op::ldmatrix_trans:
      return load_matrices(warp, op == Op::ldmatrix_trans);
    default:
      break;
  }
  uint64_t joined = op == Op::all ? 1 : 0;
  bool first = true;
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const uint64_t x = warp.value[lane];
    int from = lane;
    switch (op) {
      case Op::shfl:
        from = warp.argument[lane] & 31;
        break;
      case Op::shfl_up:
        from = lane >= warp.argument[lane] ? lane - warp.argument[lane] : lane;
        break;
      case Op::shfl_down:
        from = lane + warp.argument[lane] < 32 ? lane + warp.argument[lane] : lane;
        break;
      case Op::shfl_xor:
        from = (lane ^ warp.argument[lane]) & 31;
        break;
      case Op::ballot:
        joined |= uint64_t{x != 0} << lane;
        break;
      case Op::all:
        joined &= x != 0;
        break;
      case Op::any:
        joined |= x != 0;
        break;
      case Op::add:
        joined += x;
        break;
      case Op::min:
        joined = first || static_cast<int64_t>(x) < static_cast<int64_t>(joined) ? x : joined;
        break;
      case Op::max:
        joined = first || static_cast<int64_t>(x) > static_cast<int64_t>(joined) ? x : joined;
        break;
      case Op::match:
        warp.result[lane] = 0;
        for (uint32_t others = mask; others; others &= others - 1)
          if (const int other = __builtin_ctz(others); warp.value[other] == x)
            warp.result[lane] |= uint64_t{1} << other;
        continue;
      default:
        break;
    }
    first = false;
    if (op >= Op::shfl && op <= Op::shfl_xor) {
      if (!(mask >> from & 1))
        fault("lane %d shuffles from lane %d, which mask %08x leaves out", lane, from, mask);
      warp.result[lane] = warp.value[from];
    }
  }
  if (op >= Op::ballot && op <= Op::max)
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) warp.result[__builtin_ctz(lanes)] = joined;
}

}  // namespace

uint64_t collective(Op op, uint32_t mask, uint64_t value, int argument) {
  Warp& warp = *self->warp;
  const int lane = self->lane;
  const uint32_t bit = 1u << lane;
  self->where = __builtin_return_address(0);
  mask &= warp.present;
  if (!(mask & bit)) fault("%s of mask %08x by lane %d, which it leaves out", kOpNames[int(op)], mask, lane);
  if (mask & warp.ended)
    fault("%s of mask %08x: lanes %08x have ended", kOpNames[int(op)], mask, mask & warp.ended);
  for (uint32_t others = warp.offered; others; others &= others - 1) {
    const int other = __builtin_ctz(others);
    if ((mask >> other & 1) == 0 && (warp.mask[other] & bit) == 0) continue;
    if (warp.mask[other] != mask || warp.op[other] != op)
      fault("lanes of a warp part: lane %d is in %s of mask %08x, lane %d in %s of mask %08x", lane,
            kOpNames[int(op)], mask, other, kOpNames[int(warp.op[other])], warp.mask[other]);
    break;
  }
  warp.op[lane] = op, warp.mask[lane] = mask, warp.value[lane] = value, warp.argument[lane] = argument;
  warp.offered |= bit;
  if ((warp.offered & mask) != mask) {
    wait_in(kOpNames[int(op)]);
    return warp.result[lane];
  }
  warp.offered &= ~mask;
  complete(warp, op, mask);
  warp.ready |= mask & ~bit;
  if (warp.ready) self->block->ready |= 1u << (&warp - self->block->warps.data());
  return warp.result[lane];
}

}  // namespace simt
